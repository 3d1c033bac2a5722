"""A recommendation on the terminal."""

from rich.console import Console

from runtime_checks.grids import estimate, print_grid
from runtime_checks.recommend import Option, Recommendation
from runtime_checks.summary import DASH, megabytes, number

HEADS = ("Setting", "Size", "Memory", "Perplexity ÷", "Decode", "Prefill", "÷ the first")


def print_recommendation(found: Recommendation, console: Console | None = None) -> None:
    """Print what is chosen and why, what comes next, and what is ruled out, to stdout."""
    console = console or Console()

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False)

    say(f"Wanted: {found.wanted}.")
    if found.chosen is None:
        say(f"Nothing suits: {found.reason}.", "bold red")
        if found.nearest:
            say(f"Nearest: {found.nearest.option.setting}: {'; '.join(found.nearest.reasons)}.")
    else:
        say(f"{found.chosen.setting}: {found.reason}.", "bold green")
        print_grid(console, HEADS, [_row(option) for option in (found.chosen, *found.runners_up)])
        say(f"Perplexity ÷: that of {found.reference}, ± the error of the paired difference.", "dim")
    if found.ruled_out:
        say("Ruled out:")
    for lost in found.ruled_out:
        better = " (less perplexity)" if found.chosen and lost.option.ratio.value < found.chosen.ratio.value else ""
        say(f"  {lost.option.setting}{better}: {'; '.join(lost.reasons)}", "dim")
    say(f"From {found.frontier}; memory and speeds are those of the machine that measured it.", "dim")
    say("Memory is the peak of one process, and what the shapes say of further tokens; another process may", "dim")
    say("take some per cent more (check memory measures several).", "dim")


def _row(option: Option) -> tuple[str, ...]:
    return (
        str(option.setting),
        megabytes(option.bytes),
        megabytes(option.memory),
        estimate(option.ratio),
        number(option.decode),
        number(option.prefill),
        estimate(option.behind) if option.behind else DASH,
    )
