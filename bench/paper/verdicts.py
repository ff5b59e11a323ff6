"""The figures in the sentences of README.md under "Verdicts", computed from results/*.json.

    python -m bench.paper.verdicts

Prints each claim's phrases as they must stand in README.md, where tests/test_paper.py looks for them, and draws the figures.
A figure of a run is the mean over its seeds; "on average" is the mean over runs.
"""

from collections.abc import Callable
from typing import Any

from . import figures, tables
from .correlation import SHOWN, best_damping
from .figures import Rows, cases_of
from .rivals import WINDOWED
from .stages import join

WORDS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
# ties of methods that differ by less are counted as equal
TIE = 0.0005


def short(value: float, digits: int = 2) -> str:
    """Without the 0 before the point, and with a true minus: −.13."""
    text = f"{abs(value):.{digits}f}".removeprefix("0") if abs(value) < 1 else f"{abs(value):.{digits}f}"
    return "−" * (float(f"{value:.{digits}f}") < 0) + text


def word(number: int) -> str:
    """Small numbers in words."""
    return WORDS[number] if number < len(WORDS) else str(number)


def percent(share: float) -> str:
    """Whole per cent."""
    return f"{100 * share:.0f} %"


def claim_1(rows: Rows) -> list[str]:
    """Agreement with retraining."""
    wins = total = 0
    whole: dict[str, list[tuple[str, float]]] = {"DIT, exact": [], "influence function": []}
    gelu: dict[str, list[float]] = {window: [] for window in SHOWN}
    for (_, net), of_run in cases_of(rows, "data", "net").items():
        damped = best_damping(of_run, "pearson")
        for (_, window), cell in cases_of(of_run, "seed", "window").items():
            if window in SHOWN:
                found = {row["method"]: row["pearson"] for row in cell}
                rivals = [found[method] for method in (*WINDOWED, damped) if found[method] is not None]
                wins += found["DIT, exact"] >= max(rivals) - TIE
                total += 1
        for name, method in (("DIT, exact", "DIT, exact"), ("influence function", damped)):
            cells = [row["pearson"] for row in of_run if (row["method"], row["window"]) == (method, "whole run")]
            whole[name].append((net, tables.mean(cells)))
        if net == "mlp-gelu":
            for window in SHOWN:
                cells = [row["pearson"] for row in of_run if (row["method"], row["window"]) == ("DIT, exact", window)]
                gelu[window].append(tables.mean(cells))
    ours, theirs = (tables.mean([value for _, value in values]) for values in whole.values())
    linear = [value for net, value in whole["influence function"] if net == "logreg"]
    others = [value for net, value in whole["influence function"] if net != "logreg"]
    return [
        f"the best, or within .0005 of it, in {wins} of the {total} cases of run, seed and window",
        f"MLP with GELU reaches {short(min(map(tables.mean, gelu.values())))} and more on average",
        f"The lead on influence functions is {short(ours - theirs)} over the whole run",
        f"at its best damping, is {short(theirs)} on average against {short(ours)}",
        f"logistic regression ({short(min(linear))} to {short(max(linear))})",
        f"for the nets ({short(min(others))} to {short(max(others))})",
    ]


def claim_2(rows: Rows) -> list[str]:
    """How alike stages are."""
    runs = cases_of(rows, "data", "net")

    def means(kind: str, pair: str) -> dict[tuple[Any, ...], float]:
        return {run: tables.mean([row[kind][pair] for row in of]) for run, of in runs.items() if of[0][kind]}

    def about(values: dict[tuple[Any, ...], float]) -> tuple[str, str]:
        return f"{short(tables.mean(list(values.values())))}", f"{short(min(values.values()))} to {short(max(values.values()))}"

    def weak(pair: str) -> str:
        return percent(tables.mean([float(abs(row["spearman"][pair]) < 0.3) for row in rows]))

    thirds, epochs, near = (
        join("first third", "last third"),
        join("first epoch", "last epoch"),
        join("first third", "middle third"),
    )
    mean, spread = about(means("spearman", thirds))
    mean_epochs, spread_epochs = about(means("spearman", epochs))
    true, true_epochs = means("spearman of retraining", thirds), means("spearman of retraining", epochs)
    *_, opposed = mnist = sorted((v for (data, _), v in means("spearman", near).items() if data == "mnist"), reverse=True)
    middle, spread_middle = about(means("spearman", join("middle third", "whole run")))
    share = {name: percent(tables.mean([row["patterns"][name] for row in rows])) for name in rows[0]["patterns"]}
    return [
        f"the first and the last third is {mean} on average over the {len(runs)} runs ({spread})",
        f"between the first and the last epoch {mean_epochs} ({spread_epochs})",
        f"|ρ| < .3 in {weak(epochs)} of the runs and seeds for epochs, in {weak(thirds)} for thirds",
        f"True retraining, done for {len(true)} of the runs, gives the same ({about(true)[0]} and {about(true_epochs)[0]})",
        f"({short(mnist[-2])} to {short(mnist[0])} for the first and the middle third in "
        f"{word(len(mnist) - 1)} of the MNIST runs) or opposed ({short(opposed)} in the fourth)",
        f"ρ is {middle} on average, from {spread_middle}",
        f'"stable" is rare ({share["stable"]}); early {share["early"]}, late {share["late"]}, '
        f"fluctuating {share['fluctuating']}",
    ]


def claim_3(rows: Rows) -> list[str]:
    """Flipped labels found."""
    cases = cases_of(rows, "data", "net", "epochs", "flips")

    def means(ranking: str, key: str = "found at 1×") -> dict[tuple[Any, ...], float]:
        return {case: tables.mean([row[key] for row in of if row["ranking"] == ranking]) for case, of in cases.items()}

    whole, last, official = means("DIT, whole run"), means("DIT, last third"), means("official, last third")
    loss = means("training loss")
    better = {case: last[case] - whole[case] for case in cases if last[case] > whole[case]}
    gains = " and ".join(f"{100 * value:.0f}" for value in sorted(better.values()))
    mnist = [value for (data, *_), value in whole.items() if data == "mnist"]
    rankings = sorted({row["ranking"] for row in rows} - {"DIT, best window", "random (expected)"})
    twice = {name: means(name, "found at 2×") for name in rankings}
    reached = [case for case in cases if any(values[case] >= 0.98 for values in twice.values())]

    def among(*names: str) -> int:
        return sum(any(twice[name][case] >= 0.98 for name in names) for case in reached)

    def less(other: dict[tuple[Any, ...], float]) -> str:
        return f"{100 * tables.mean([whole[case] - other[case] for case in cases]):.0f} points"

    return [
        f"The last third was the worse one in {sum(last[case] < whole[case] for case in cases)} of {len(cases)} cases",
        f"over the {len(cases)} cases the last third finds {less(last)} less than the whole run "
        f"({less(official)} with the published code's query)",
        f"better in {word(len(better))} cases, the CNN on MNIST with 20 and 30 % flipped, by {gains} points",
        f"the whole run finds {100 * min(mnist):.0f} to {100 * max(mnist):.0f} % on MNIST",
        f"by at least one ranking in {len(reached)} of {len(cases)} cases",
        f"these rankings in {word(among('DIT, last third'))} of the {len(reached)} "
        f"({word(among('DIT, last third', 'official, last third'))} with either query), "
        f"the whole run in {among('DIT, whole run')}",
        f"does better than the whole run in {sum(loss[case] > whole[case] for case in cases)} of {len(cases)} cases",
    ]


def cleaning(rows: Rows) -> list[str]:
    """What dropping suspects does to the test accuracy."""
    cases = cases_of(rows, "data", "net", "flips")

    def gain(dropped: str, over: str) -> dict[tuple[Any, ...], float]:
        def accuracy(of: Rows, name: str) -> float:
            return 100 * tables.mean([row["accuracy"] for row in of if row["dropped"] == name])

        return {case: accuracy(of, dropped) - accuracy(of, over) for case, of in cases.items()}

    over_loss, over_none = gain("DIT, whole run", "training loss"), gain("DIT, whole run", "nothing")
    cifar = [value for (data, *_), value in over_none.items() if data == "cifar"]
    third = [over_none["emnist", "mlp", 0.3], over_none["mnist", "mlp", 0.3]]
    small = {f"{value:.0f}" for value in third}
    return [
        f"than dropping by the training loss in {sum(v > 0 for v in over_loss.values())} of {len(cases)} cases, by "
        f"{short(min(over_loss.values()), 1)} to {max(over_loss.values()):.0f} points",
        f"{short(min(cifar), 1)} to {short(max(cifar), 1)} points on CIFAR-10, {' or '.join(sorted(small))} on "
        "EMNIST and MNIST with 30 % flipped",
    ]


PARTS: dict[str, Callable[[Rows], list[str]]] = {
    "correlation": claim_1,
    "stages": claim_2,
    "detection": claim_3,
    "cleaning": cleaning,
}


def phrases(name: str) -> list[str]:
    """What README.md says of results/NAME.json, word for word but for line breaks."""
    return PARTS[name](tables.read(name)["rows"])


def main() -> None:
    for name in PARTS:
        print(f"{name}:", *phrases(name), sep="\n  … ")
    figures.draw()


if __name__ == "__main__":
    main()
