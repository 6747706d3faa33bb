"""Is a sampler right? Runs it on the model with a known exact solution, and judges its end and each step."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from gallery.options import Family
from gallery.refused import Refused
from parity.exact import KNOWN, sliced_wasserstein, solve
from parity.result import without_nan
from parity.rules import Rule, distance, rules, step_noises
from parity.sides import Side
from parity.subject import Run, Subject

COUNTS, DRAWS = (5, 10, 20, 40, 80, 160), (10, 20, 50, 100)
LATTICE = (1, 50, 80)  # 4,000 samples: one picture with so many rows and columns of patches
DETERMINISTIC, STOCHASTIC = ("euler", "heun", "dpmpp_2m"), ("euler_ancestral", "dpmpp_2m_sde")  # to compare with
MUCH = {True: "too much noise", False: "too little noise"}
Row = dict[str, Any]
Show = Callable[[str], Any]  # gets each line as it is known


@dataclass
class Answer:
    """What was found."""

    name: str
    family: str
    stochastic: bool
    rows: list[Row] = field(default_factory=list)  # of the deterministic runs
    draws: dict[str, list[Row]] = field(default_factory=dict)  # of the stochastic runs, by sampler
    true: tuple[float, float] = (math.nan, math.nan)  # distance of two true sets: mean, spread over seeds
    rules: list[Rule] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # why it is wrong; empty if it is right
    samples: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # that it drew

    @property
    def verdict(self) -> str:
        first = f"wrong: {'; '.join(self.wrong)}" if self.wrong else "right"
        return ". ".join([first, *(one[0].upper() + one[1:] for one in self.found)]) + "."

    def as_json(self) -> dict[str, Any]:
        whole = {"verdict": self.verdict, "right": not self.wrong, **asdict(self)}
        return without_nan({name: value for name, value in whole.items() if name != "samples"})


@torch.no_grad()
def judge(subject: Subject, show: Show = lambda words: None) -> Answer:
    """All that can be found out."""
    answer = Answer(subject.side.text, subject.family.name, subject.stochastic)
    if subject.quiet or not subject.stochastic:
        words = "relative errors against the exact end of the ODE, and above: at the lowest level that all rows share\n"
        show(("with eta=0, " if subject.quiet else "") + words)
        _deterministic(subject, answer, show)
    if subject.stochastic:
        _stochastic(subject, answer, show)
    show("")
    for rule in rules(subject):
        answer.rules.append(rule)
        mark = {True: "ok   ", False: "WRONG", None: "-    "}[rule.kept]
        show(f"{mark}  {rule.name}{f': {rule.words}' if rule.words else ''}")
        if rule.kept is False:
            answer.wrong.append(f"{rule.name}: no, {rule.words}")
    show(f"\n{answer.verdict[0].upper()}{answer.verdict[1:]}")
    return answer


def _table(answer: Answer, rows: list[Row], counts: Sequence[int], row: Callable[[int], Row], show: Show) -> None:
    """Fills `rows` by `row(count)` and shows each. Some of diffusers' schedulers take only so many steps."""
    for count in tqdm(counts, desc="running", unit=" runs", leave=False, disable=None):
        try:
            rows.append(row(count))
        except Refused as refused:
            if len(rows) < 3:
                raise
            answer.found.append(str(refused))
            break
        if len(rows) == 1:
            show("".join(f"{name:>12}" for name in rows[0]))
        show("".join(f"{value:>12.4g}" for value in rows[-1].values()).replace("nan", "   "))


def _deterministic(subject: Subject, answer: Answer, show: Show) -> None:
    shared = min(t for t in subject.ts(20).tolist() if t > 0)  # a level that all finer runs come to
    rows, runs = answer.rows, list[Run]()

    def row(steps: int) -> Row:
        tolerances: Row = {"rtol": 10 / steps**2, "atol": 1.5 / steps**2} if "rtol" in subject.parameters else {}
        runs.append(run := subject.run(20 if tolerances else steps, **subject.quiet, **tolerances))
        t, x, *_ = next((one for one in reversed(run.asked) if one[0] >= shared * (1 - 1e-3)), run.asked[-1])
        exact = solve(KNOWN, run.begin, run.first, sorted({min(t, run.first), run.last}, reverse=True))
        error, above = distance(run.end, exact[-1]), max(distance(x, exact[0]), 1e-15)
        n, order = len(run.asked), math.nan
        if rows and n != rows[-1]["evaluations"]:
            order = (math.log(rows[-1]["above"]) - math.log(above)) / math.log(n / rows[-1]["evaluations"])
        found = {**(tolerances or {"steps": steps}), "evaluations": n, "error": error, "above": above, "order": order}
        for name in DETERMINISTIC:
            levels = subject.levels((n + 1) // 2 if name == "heun" else n)
            found[name] = _reference(name, subject.family, tuple(levels.tolist()), sampled=False)
        return found

    _table(answer, rows, COUNTS, row, show)
    if not all(math.isfinite(row["error"]) for row in rows):
        answer.wrong.append("its end is not finite")
        return
    last, orders = rows[-1], [row["order"] for row in rows]
    least = 1e-3 if subject.stock else 1e-6  # many of diffusers' schedulers round their timesteps
    least = 2 * last["euler"] if math.isnan(orders[-1]) else least  # as many evaluations whatever the steps
    if last["above"] > least and not max(orders[-2:]) >= 0.5:
        answer.wrong.append(
            f"stays {max(last['error'], last['above']):.1%} from the exact end however many steps it takes"
        )
    near = min(rows, key=lambda row: abs(row["evaluations"] - 20))
    words = f"at {near['evaluations']} evaluations {near['error'] / near['dpmpp_2m']:.2g} times the error of dpmpp_2m"
    if not subject.own_steps:
        order = max(orders[-3:]) if subject.stock else sorted(orders[-3:])[1]  # one row may jump
        words = f"order {order:.1f}; {words}"
        answer.wrong += _judge_steps(subject, runs[-3], runs[-1])
    answer.found.append(words)


def _judge_steps(subject: Subject, coarse: Run, fine: Run) -> list[str]:
    """What is wrong with a step of the finer run, which takes four times as many.

    A step's own error is a bounded multiple of that of Euler's step for any method that is consistent. A step that is
    not consistent has an error of order h and not h^2, and so a share that grows as the number of steps.
    """
    few, many = _shares(subject, coarse), _shares(subject, fine)
    less, most, wrong = max(few[:-1]), max(many[:-1]), list[str]()
    if most > max(5, 2 * less):
        step = f"step {many.index(most) + 1} of {len(many)}"
        grows = f"with {len(few)} steps {less:.3g}, with {len(many)} {most:.3g} times that of Euler's step"
        wrong.append(f"{step} has an error that does not fall as its length squared: {grows}")
    if many[-1] > 3:
        wrong.append(f"the last step has {many[-1]:.2g} times the error of Euler's step to the same level")
    return wrong


def _shares(subject: Subject, run: Run) -> list[float]:
    """The error of each step over that of Euler's step. Of several evaluations at one level the last begins a step."""
    states = [*run.asked, (run.last, run.end, run.end, 0.0)]
    states = [one for one, after in zip(states, states[1:]) if abs(one[0] - after[0]) > 1e-9] + states[-1:]
    t = torch.tensor([state[0] for state in states], dtype=torch.float64)[:, None, None]
    x = torch.stack([state[1][0, :64] for state in states])
    (high, low), begin = (t[:-1], t[1:]), x[:-1]
    (exact,) = solve(KNOWN, begin, high, [low])
    x0, noise = KNOWN.split(begin, 1 - high, high)
    own, euler = ((end - exact).flatten(1).norm(dim=1) for end in (x[1:], begin + (low - high) * (noise - x0)))
    if subject.stock:  # many of diffusers' schedulers round their timesteps: what a timestep more changes
        more = [subject.t(subject.session().level_of(timestep + 1)) for *_, timestep in states[:-1]]
        t_more = torch.tensor(more, dtype=torch.float64)[:, None, None]
        x0_more, noise_more = KNOWN.split(begin, 1 - t_more, t_more)
        euler += ((low - high) * (noise_more - x0_more - noise + x0)).flatten(1).norm(dim=1)
    return (own / (euler + 1e-7)).tolist()  # which is more than the rounding of float32


@functools.cache
def _reference(name: str, family: Family, levels: tuple[float, ...], sampled: bool) -> Any:
    """The error of a sampler of k-diffusion over these levels, or what its samples show."""
    side = Side(name, importlib.import_module(family.module).find_sampler(name).function, {})
    at = torch.tensor(levels, dtype=torch.float64)
    run = Subject(side, family).run(len(levels) - 1, levels=at, shape=LATTICE if sampled else (1, 8, 8))
    return _sampled(run) if sampled else distance(run.end, solve(KNOWN, run.begin, run.first, [0.0])[0])


def _stochastic(subject: Subject, answer: Answer, show: Show) -> None:
    pairs = [[KNOWN.sample(4000, torch.Generator().manual_seed(2 * i + j)) for j in (1, 2)] for i in range(8)]
    apart = torch.tensor([sliced_wasserstein(one, other, 128) for one, other in pairs])
    mean, spread = answer.true = apart.mean().item(), apart.std().item()
    show(f"\n4,000 samples: sliced Wasserstein distance from true ones (two true sets {mean:.3f} +- {spread:.3f}), and")
    show("the ratio of standard deviations about the nearest of the mixture's components\n")
    runs = list[Run]()

    def draws(name: str, counts: Sequence[int], row: Callable[[int], Row]) -> list[Row]:
        show(name)
        rows = answer.draws[name] = []
        _table(answer, rows, counts, lambda steps: {"steps": steps, **row(steps)}, show)
        return rows

    def own(one: Subject, steps: int) -> Row:
        runs.append(one.run(steps, shape=LATTICE))
        return _sampled(runs[-1])

    def other(name: str, steps: int) -> Row:
        return _reference(name, subject.family, tuple(subject.levels(steps).tolist()), sampled=True)

    rows = draws(answer.name, DRAWS, functools.partial(own, subject))
    run, answer.samples = runs[-1], runs[-1].end[0]
    others = [draws(name, DRAWS[: len(rows)], functools.partial(other, name)) for name in STOCHASTIC]
    wrong = _judge_samples(rows, others, answer.true)
    if len(run.asked) <= DRAWS[-1] and abs((factor := _noise(run)) - 1) > 0.03:
        wrong.append(f"{factor:.2f} times the noise that its levels leave room for: {MUCH[factor > 1]}")
    if (share := _shares(subject, run)[-1]) > 3:
        wrong.append(f"the last step has {share:.2g} times the error of Euler's: noise is added after it")
    ends = [f"{row['distance']:.3f} at {row['steps']} steps" for row in (rows[0], rows[-1])]
    answer.found.append(f"distance from true samples {', '.join(ends)}")
    if subject.flux and not subject.stock:
        other_way = Subject(subject.side, subject.family, subject.schedule, "flow" if subject.ve else "ve")
        name = f"{answer.name}, parameterization {other_way.options.parameterization}"
        rows = draws(name, DRAWS, functools.partial(own, other_way))
        if wrong and other_way.ve and not _judge_samples(rows, others, answer.true):
            wrong.append('parameterization "flow" adds its noise to the wrong process; with "ve" its samples are right')
    answer.wrong += wrong


def _sampled(run: Run) -> Row:
    """What the samples of a run show."""
    true = KNOWN.sample(4000, torch.Generator().manual_seed(10**6))
    apart, std = sliced_wasserstein(run.end[0], true, 128), KNOWN.within(run.end[0], run.last)
    return {"evaluations": len(run.asked), "distance": apart, "std": std}


def _judge_samples(rows: list[Row], others: list[list[Row]], true: tuple[float, float]) -> list[str]:
    """What is wrong with samples, beyond chance and what the steps explain by the other samplers.

    The spread goes to its limit as 1 / steps, or faster. Of 64,000 numbers chance is 1 / sqrt(128,000).
    """
    limit, *limits = (2 * one[-1]["std"] - one[-2]["std"] for one in (rows, *others))
    wrong = list[str]()
    explained = max(min(row[-1]["distance"] for row in others), true[0] + 4 * true[1])
    if not rows[-1]["distance"] < 1.5 * explained:
        wrong.append(
            f"the distance of its samples from true ones is {rows[-1]['distance']:.3f}, of two true sets {true[0]:.3f}"
        )
    if not abs(limit - 1) < 4 * math.sqrt(5 / 128000) + max(abs(one - 1) for one in limits):
        wrong.append(f"its samples' standard deviation goes to {limit:.2f} times the true one: {MUCH[limit > 1]}")
    return wrong


def _noise(run: Run) -> float:
    """The noise of all steps over what their levels leave room for."""
    noises, rooms = zip(*step_noises(run))
    added, room = sum(noise.square().mean().item() for noise in noises), sum(rooms)
    return math.sqrt(added / room) if room > 0.01 * len(run.asked) else 1.0
