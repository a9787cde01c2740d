"""A panel for notebooks: move the run, see what every published law says. Needs no study and trains nothing."""

import html

import ipywidgets as widgets

from etastar.analysis.laws import format_advice, over_horizon, recommend
from etastar.analysis.laws.advice import OPTIMIZERS, PARAMETRIZATIONS, SCHEDULES

HORIZONS_AROUND = tuple(4.0**k for k in range(-3, 4))
WIDE = {"description_width": "120px"}


def law_panel(params: float = 1.3e9, horizon_tokens: float = 100e9, batch_tokens: float = 2e6, schedule: str = "wsd",
              parametrization: str = "sp", width: int = 2048, base_width: int = 256, optimizer: str = "adamw") -> widgets.VBox:
    """Inputs above a table of `recommend` and its two figures, redrawn at each change; show it as a cell's last value.

    Units are those of `recommend`; an empty or zero batch means none. What cannot be computed is told in the table's place.
    The box's `.inputs` are the widgets by name, `.advice` the frame shown (None where there is none).
    """
    numbers = {"params": params, "horizon_tokens": horizon_tokens, "batch_tokens": batch_tokens, "width": width, "base_width": base_width}
    choices = {"schedule": (SCHEDULES, schedule), "parametrization": (PARAMETRIZATIONS, parametrization),
               "optimizer": (OPTIMIZERS, optimizer)}
    inputs = {name: widgets.FloatText(value=float(value), description=_label(name), continuous_update=False, style=WIDE)
              for name, value in numbers.items()}
    inputs |= {name: widgets.Dropdown(options=options, value=value, description=_label(name), style=WIDE)
               for name, (options, value) in choices.items()}
    table, spread, lines = widgets.HTML(), widgets.Image(format="png"), widgets.Image(format="png")
    box = widgets.VBox([widgets.GridBox(list(inputs.values()), layout=widgets.Layout(grid_template_columns="repeat(3, 320px)")),
                        table, spread, lines])
    box.inputs, box.advice = inputs, None

    def redraw(change=None):
        box.advice = _redraw({name: widget.value for name, widget in inputs.items()}, table, spread, lines)

    for widget in inputs.values():
        widget.observe(redraw, names="value")
    redraw()
    return box


def _label(name: str) -> str:
    return name.replace("_", " ")


def _redraw(asked: dict, table, spread, lines):
    """The advice shown, or None where it cannot be computed; then the reason is shown."""
    asked = {name: value for name, value in asked.items() if value != 0 or name in ("params", "horizon_tokens")}
    try:
        advice = recommend(**asked)
    except ValueError as error:
        table.value, advice = f"<b>{html.escape(str(error))}</b>", None
        spread.value = lines.value = b""
        return advice
    table.value = f"<pre>{html.escape(format_advice(advice))}</pre>"
    spread.value, lines.value = _pictures(asked, advice)
    return advice


def _pictures(asked: dict, advice) -> tuple[bytes, bytes]:
    from etastar.plots import law_lines, recommendation

    said = advice["applies"] & (advice["quantity"] == "peak_lr")
    horizons = [asked["horizon_tokens"] * factor for factor in HORIZONS_AROUND]
    setting = {name: value for name, value in asked.items() if name not in ("params", "horizon_tokens", "batch_tokens", "parametrization")}
    batch = asked.get("batch_tokens")
    if batch:
        horizons = [tokens for tokens in horizons if tokens >= batch]
    frame = over_horizon(asked["params"], horizons, batch, **setting)
    return (recommendation(advice)._repr_png_() if said.any() else b"", law_lines(frame)._repr_png_() if len(frame) else b"")
