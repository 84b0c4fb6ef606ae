"""The demo's plots."""

import threading

from gradio.components.plot import PlotData
from gradio.processing_utils import encode_plot_to_base64
from matplotlib.figure import Figure  # pyplot would retain every figure

from pipeline.search.search import SearchState
from pipeline.serving.requests import parse_integer

INDIGO = "#4f46e5"
PINK = "#be185d"
PLOT_LOCK = threading.Lock()  # matplotlib is not thread-safe


def to_plot_data(figure: Figure) -> PlotData:
    """Return a figure as gr.Plot shows it; Gradio itself would render several at once."""
    with PLOT_LOCK:
        return PlotData(type="matplotlib", plot=encode_plot_to_base64(figure))


def plot_schedule(curves: dict[str, list[float]], t: object) -> PlotData:
    """Plot the schedule's four curves, each of T values, and mark timestep t."""
    T = min(map(len, curves.values()))
    step = parse_integer("t", t, 1, T)
    figure = Figure(figsize=(11, 2.4), layout="constrained")
    for ax, (name, values) in zip(figure.subplots(1, 4), curves.items(), strict=True):
        value = values[step - 1]
        ax.plot(range(1, T + 1), values, color=INDIGO)
        ax.plot([step], [value], "o", color=PINK)
        ax.set_title(f"{name}\n{value:.3g} at t = {step}", fontsize=10)
        if name.startswith("SNR"):
            ax.set_yscale("log")
    return to_plot_data(figure)


def plot_search(state: SearchState) -> PlotData:
    """Plot the best score of a search against its network calls."""
    calls, scores = zip(*state.curve, strict=True)
    figure = Figure(figsize=(5, 2.2), layout="constrained")
    ax = figure.subplots()
    ax.plot(calls, scores, "o-", color=INDIGO, drawstyle="steps-post")
    ax.set(xlabel="network calls", ylabel="best score (nats)")
    return to_plot_data(figure)
