"""Which sampler each preset uses, and how few-step samplers did in front of the gate, as HTML."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from metadiff.report.accuracies import minus
from metadiff.report.content import Variant
from metadiff.report.results import percent

_METHODS = {"eq8": "Eq. 8", "eq8_2m": "Eq. 8, 2nd order", "ddim": "DDIM", "dpmpp2m": "DPM-Solver++ 2M"}
_SPACINGS = {"even": "", "log_snr": " in log-SNR"}
_NOTE = (
    "Accuracy of few-step samplers minus that of all steps of Eq. 8, on the same tasks of {split} classes and from the same w<sub>T</sub>, "
    "in points with paired 95 % intervals. A sampler passes (✓) where the whole interval lies above &minus;{margin}; the cheapest that "
    "passes is taken, and all steps of Eq. 8 where none does: in bold. The rows <code>metadiff</code>, <code>identity</code> and "
    "<code>untrained</code> use what is taken; the curves along the denoising are those of all steps."
)


def samplers_html(variants: Sequence[Variant]) -> str:
    """A table of the candidates over shots and presets; empty where nothing was chosen by a gate."""
    shots = sorted({shot for variant in variants for shot in variant.samplers}, key=int)
    found = [(shot, variant.name, variant.samplers.get(shot, {})) for shot in shots for variant in variants]
    gates = {(name, f"{shot}-shot"): record for shot, name, record in found if "trace" in record}
    if not gates:
        return ""
    first = next(iter(gates.values()))
    note = _NOTE.format(split=escape(first["split"]), margin=f"{100 * first['margin']:.1f}")
    return f'<p class="note">{note}</p>{_table(gates)}'


def sampler_name(taken: Mapping[str, Any], evaluations: int) -> str:
    """For people: `DDIM, 10 steps`."""
    steps = f"{evaluations} step{'s' * (evaluations != 1)}"
    return f"{_METHODS.get(taken['method'], taken['method'])}, {steps}{_SPACINGS.get(taken.get('spacing', 'even'), '')}"


def _table(gates: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """All samplers that were tried for any preset, the fewest steps first."""
    trials = {about: {sampler_name(row, row["evaluations"]): row for row in record["trace"]} for about, record in gates.items()}
    steps = {sampler: row["evaluations"] for rows in trials.values() for sampler, row in rows.items()}
    taken = {about: sampler_name(record["taken"], record["evaluations"]) for about, record in gates.items() if record["gated"]}
    head = "".join(
        f'<th class="number">{escape(name)}<br><small>{shot}, {record["tasks"]:,} tasks</small></th>'
        for (name, shot), record in gates.items()
    )
    lines = [_line("all steps of Eq. 8: accuracy, %", [_reference(record) for record in gates.values()])]
    for sampler in sorted(steps, key=steps.__getitem__):
        lines.append(_line(sampler, [_cell(rows.get(sampler), taken.get(about) == sampler) for about, rows in trials.items()]))
    return f'<div class="scroll"><table><thead><tr><th>Sampler</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _line(title: str, cells: Iterable[str]) -> str:
    numbers = "".join(f'<td class="number">{cell}</td>' for cell in cells)
    return f"<tr><td>{title}</td>{numbers}</tr>"


def _reference(record: Mapping[str, Any]) -> str:
    accuracy = f"{100 * record['reference_accuracy']:.2f}"
    return accuracy if record["gated"] else f"<b>{accuracy}</b>"


def _cell(row: Mapping[str, Any] | None, is_taken: bool) -> str:
    if row is None:
        return ""
    shown = minus(percent(row["difference"], row["ci95"], signed=True))
    if is_taken:
        return f"<b>{shown} ✓</b>"
    return f"{shown} ✓" if row["passed"] else f'<span class="failed">{shown} ✗</span>'
