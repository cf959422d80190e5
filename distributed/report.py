"""The stage `report`: the page over what has been evaluated."""

import sys

from metadiff import stages

STAGE = stages.STAGES["report"]

if __name__ == "__main__":
    from distributed.pipeline import main

    sys.exit(main(stage="report"))
