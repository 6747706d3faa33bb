"""Is a sampler right? Runs it on the model with a known exact solution, and judges its end and each step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm

from gallery.options import Family
from gallery.refused import Refused
from parity.exact import KNOWN, sliced_wasserstein, solve
from parity.result import without_nan
from parity.rules import Rule, distance, rules
from parity.subject import Run, State, Subject, reference

COUNTS, DRAWS = (5, 10, 20, 40, 80, 160), (10, 20, 50, 100)
RTOLS = (0.4, 0.1, 0.025, 0.00625, 0.0016, 0.0004)
LATTICE = (1, 50, 80)  # 4,000 samples: one picture with so many rows and columns of patches
DETERMINISTIC, STOCHASTIC = ("euler", "heun", "dpmpp_2m"), ("euler_ancestral", "dpmpp_2m_sde")  # to compare with
Row = dict[str, Any]


def number(value: float) -> str:
    """For a cell of a table."""
    return "" if math.isnan(value) else str(value) if isinstance(value, int) else f"{value:.3g}"


@dataclass
class Answer:
    """What was found."""

    subject: Subject
    show: Callable[[str], Any]  # gets each line as it is known
    rows: list[Row] = field(default_factory=list)  # of the deterministic runs
    draws: dict[str, list[Row]] = field(default_factory=dict)  # of the stochastic runs, by sampler
    true: tuple[float, float] = (math.nan, math.nan)  # distance of two true sets: mean, spread over seeds
    rules: list[Rule] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # why it is wrong; empty if it is right
    samples: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # that it drew

    @property
    def right(self) -> bool:
        return not self.wrong

    @property
    def verdict(self) -> str:
        first = "right" if self.right else f"wrong: {'; '.join(self.wrong)}"
        return ". ".join([first, *(one[0].upper() + one[1:] for one in self.found)]) + "."

    def as_json(self) -> dict[str, Any]:
        subject, names = self.subject, ("rows", "draws", "true", "found", "wrong")
        whole = {"verdict": self.verdict, "right": self.right, "name": subject.side.text, "family": subject.family.name}
        whole |= {name: getattr(subject, name) for name in ("stochastic", "own_steps")}
        whole |= {name: getattr(self, name) for name in names}
        return without_nan({**whole, "rules": [asdict(rule) for rule in self.rules]})

    def table(self, rows: list[Row], counts: tuple[int, ...], row: Callable[[int], Row]) -> None:
        """Fills `rows` by `row(count)` and shows each. Some of diffusers' schedulers take only so many steps."""
        for count in tqdm(counts, desc="running", unit=" runs", leave=False, disable=None):
            try:
                rows.append(row(count))
            except Refused as refused:
                if len(rows) < 3:
                    raise
                self.found.append(str(refused))
                break
            for line in [[*rows[0]], list(map(number, rows[-1].values()))][len(rows) > 1 :]:
                self.show("".join(f"{cell:>12}" for cell in line))


@torch.no_grad()
def judge(subject: Subject, show: Callable[[str], Any] = lambda words: None) -> Answer:
    """All that can be found out. `show` gets each line as it is known."""
    answer = Answer(subject, show)
    if subject.quiet or not subject.stochastic:
        show(("with eta=0, " if subject.quiet else "") + "relative errors against the exact end of the ODE\n")
        _deterministic(subject, answer)
    if subject.stochastic:
        _stochastic(subject, answer)
    show("")
    for rule in rules(subject):
        answer.rules.append(rule)
        mark = {True: "ok   ", False: "WRONG", None: "-    "}[rule.kept]
        show(f"{mark}  {rule.name}{f': {rule.words}' if rule.words else ''}")
        if rule.kept is False:
            answer.wrong.append(f"{rule.name}: no, {rule.words}")
    show(f"\n{answer.verdict[0].upper()}{answer.verdict[1:]}")
    return answer


def _deterministic(subject: Subject, answer: Answer) -> None:
    by_rtol = "rtol" in subject.parameters
    fixed = next(t for t in reversed(subject.ts(20).tolist()) if t > 0)  # a level that all finer runs come to
    local, runs, floor = dict[int, tuple[torch.Tensor, torch.Tensor]](), list[Run](), 0.0

    def row(steps: int) -> Row:
        nonlocal floor
        rtol = RTOLS[COUNTS.index(steps)]
        extra: dict[str, Any] = {"rtol": rtol, "atol": 0.15 * rtol} if by_rtol else {}
        run = subject.run(20 if by_rtol else steps, **subject.quiet, **extra)
        runs.append(run)
        t, x, _ = next((one for one in reversed(run.asked) if one[0] >= fixed * (1 - 1e-3)), run.asked[-1])
        final = max(run.asked[-1][0], 1e-9)  # where the last step begins
        ends = sorted({t, final, run.last, 0.0}, reverse=True)
        exact = dict(zip(ends, solve(KNOWN, run.begin, run.first, [min(end, run.first) for end in ends])))
        floor = distance(KNOWN.split(exact[final], 1 - final, final)[0], exact[0.0])
        n, error, above, order = len(run.asked), distance(run.end, exact[run.last]), distance(x, exact[t]), math.nan
        if answer.rows and n != (before := answer.rows[-1])["evaluations"] and above > 0:
            order = math.log(before["above"] / above) / math.log(n / before["evaluations"])
        if steps >= 20:
            local[steps] = _local(subject, run, steps)
        found: Row = {"rtol": rtol} if by_rtol else {"steps": steps}
        found |= {"evaluations": n, "error": error, "above": above, "order": order}
        for name in DETERMINISTIC:
            levels = subject.levels((n + 1) // 2 if name == "heun" else n)
            found[name] = _reference(name, subject.family, tuple(levels.tolist()), sampled=False)
        return found

    answer.table(answer.rows, COUNTS, row)
    last = answer.rows[-1]
    if not all(math.isfinite(row["error"]) for row in answer.rows):
        answer.wrong.append("its end is not finite")
        return
    orders = [row["order"] for row in answer.rows[1:]][-3:]
    jumps, words = abs(orders[-1] - orders[-2]) > 1, ""
    if not subject.own_steps:
        order = max(orders) if subject.stock else sum(orders[-2:]) / 2 if jumps else orders[-1]
        words = f"order {order:.1f}{_judge_steps(subject, answer, runs[-1], local, orders, floor)}; "
    elif not by_rtol and last["above"] > max(2 * last["euler"], 1e-3):
        answer.wrong.append(f"{last['error']:.1%} from the exact end with {last['evaluations']} evaluations")
    elif by_rtol and not last["above"] < answer.rows[2]["above"] / 2:
        answer.wrong.append(f"stays {last['error']:.1%} from the exact end however small rtol is")
    near = min(answer.rows, key=lambda row: abs(row["evaluations"] - 20))
    ratio = near["error"] / near["dpmpp_2m"]
    answer.found.append(f"{words}at {near['evaluations']} evaluations {ratio:.2g} times the error of dpmpp_2m")


@functools.cache
def _exact_end(first: float, begin: tuple[float, ...]) -> torch.Tensor:
    """Of the default runs, most of which begin at the same x."""
    return solve(KNOWN, torch.tensor(begin, dtype=torch.float64).view(1, 64, -1), first, [0.0])[0]


@functools.cache
def _reference(name: str, family: Family, levels: tuple[float, ...], sampled: bool) -> Any:
    """The error of a sampler of k-diffusion over these levels, or what its samples show."""
    at = torch.tensor(levels, dtype=torch.float64)
    run = reference(name, family).run(0, levels=at, shape=LATTICE if sampled else (1, 8, 8))
    return _sampled(run) if sampled else distance(run.end, _exact_end(run.first, tuple(run.begin.flatten().tolist())))


def _judge_steps(
    subject: Subject, answer: Answer, run: Run, local: dict[int, Any], orders: list[float], floor: float
) -> str:
    """Whether the error falls, and whether each step's own does. Returns a remark on the order.

    A step's own error is compared with the error of Euler's step from the same state. It is less for a method of a
    higher order, the same in its first and last steps, and a bounded multiple for any that is consistent. A step that
    is not consistent has an error of order h and not h^2, and so a share that grows as the number of steps.
    """
    last, exactly = answer.rows[-1], not subject.stock
    stays = orders[-1] < 0.5 and (not exactly or orders[-2] < 0.5)
    if stays and (last["above"] > 1e-6 and exactly or last["error"] > 2 * floor + 1e-6):
        worst = max(last["error"], last["above"])
        answer.wrong.append(f"stays {worst:.1%} from the exact end however many steps it takes")
    shares = {steps: own / euler for steps, (own, euler) in local.items()}
    most = {steps: share[:-1].max().item() for steps, share in shares.items()}
    n = max(shares)
    few = n // 4 if n // 4 in shares else min(shares)
    if most[n] > 5 and most[n] > 2 * most[few]:
        at = int(shares[n][:-1].argmax()) + 1
        early = " as if it used predictions that it does not have yet" if at < 4 and shares[n].median() < 1 else ""
        grows = f"with {few} steps {most[few]:.3g}, with {n} {most[n]:.3g} times the error of Euler's step"
        answer.wrong.append(f"step {at} of {n} has an error that does not fall as its length squared: {grows}{early}")
    if shares[n][-1] > 3 and local[n][0][-1] > 1e-6:
        answer.wrong.append(f"the last step has {shares[n][-1]:.2g} times the error of Euler's step to the same level")
    if answer.wrong or max(orders) >= 1.5 or last["above"] <= 1e-6:
        return ""
    at, several = len(run.asked) // 2, last["evaluations"] > 1.5 * last["steps"]
    memory = _fit(run, at, at + 1, 0)[1].norm() / local[n][1][at]
    if (several and not (shares[n] - 1).abs().max() < 0.02) or (not several and memory > 0.01):
        uses = "evaluates several times" if several else "uses earlier predictions"
        return f", as Euler's method has, although it {uses} in a step"
    return ""


def _states(subject: Subject, run: Run, steps: int) -> list[int]:
    """The evaluations that begin steps: the last one at each level, or all where the levels are not those given."""
    asked = [t for t, *_ in run.asked]
    if not subject.stock:
        ts = [run.first, *(t for t in subject.ts(steps).tolist()[1:] if t > run.last)]
        at = [[i for i, t in enumerate(asked) if abs(t - level) <= 1e-6 * level] for level in ts]
        if all(at):
            return [found[-1] for found in at]
    return [i for i, t in enumerate(asked) if i + 1 == len(asked) or abs(asked[i + 1] - t) > 1e-9]


def _local(subject: Subject, run: Run, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each step by itself: its error, and that of Euler's step from the same state and of a timestep's rounding."""
    states = [run.asked[i] for i in _states(subject, run, steps)]
    states += [(run.last, run.end, 0.0)] if abs(states[-1][0] - run.last) > 1e-9 else []
    own, euler = _defects(states)
    if subject.stock:  # what a timestep more would change
        for i, ((t, x, timestep), (low, *_)) in enumerate(zip(states, states[1:])):
            sigma = subject.near(timestep)[1]
            euler[i] += abs(low - t) * (_velocity(x, min(sigma / (1 + sigma), 1.0)) - _velocity(x, t)).norm()
    return own, euler.abs() + 1e-12


def _velocity(x: torch.Tensor, t: Any) -> torch.Tensor:
    x0, noise = KNOWN.split(x, 1 - t, t)
    return noise - x0


def _defects(states: list[State]) -> tuple[torch.Tensor, torch.Tensor]:
    """The error of each step from one state to the next, and of Euler's, the larger one of those in t and in sigma."""
    t = torch.tensor([state[0] for state in states], dtype=torch.float64)[:, None, None]
    x = torch.stack([state[1][0] for state in states])
    (high, low), begin = (t[:-1], t[1:]), x[:-1]
    (exact,) = solve(KNOWN, begin, high, [low])
    x0, noise = KNOWN.split(begin, 1 - high, high)
    in_t = begin + (low - high) * (noise - x0) - exact
    left = (1 - high).clamp(min=1e-9)
    in_sigma = (begin / left + (low / (1 - low) - high / left) * noise) * (1 - low) - exact
    euler = (in_t, torch.where(high < 1 - 1e-6, in_sigma, in_t))
    return (x[1:] - exact).flatten(1).norm(dim=1), torch.stack(euler).flatten(2).norm(dim=2).amax(0)


def _stochastic(subject: Subject, answer: Answer) -> None:
    mean, spread = answer.true = _chance()
    answer.show(
        f"\n4,000 samples: sliced Wasserstein distance from true ones (two true sets {mean:.3f} +- {spread:.3f}), the\n"
        "ratio of standard deviations, and that ratio about the nearest of the mixture's components\n"
    )
    runs = list[Run]()

    def draws(name: str, row: Callable[[int], Row]) -> list[Row]:
        answer.show(name)
        rows = answer.draws[name] = []
        answer.table(rows, DRAWS, lambda steps: {"steps": steps, **row(steps)})
        return rows

    def own(one: Subject, steps: int) -> Row:
        runs.append(one.run(steps, shape=LATTICE))
        return _sampled(runs[-1])

    def other(name: str, steps: int) -> Row:
        return _reference(name, subject.family, tuple(subject.levels(steps).tolist()), sampled=True)

    rows = draws(subject.side.text, functools.partial(own, subject))
    end, answer.samples = runs[-1], runs[-1].end[0]
    others = [draws(name, functools.partial(other, name)) for name in STOCHASTIC]
    wrong = _judge_samples(rows, others, answer.true)
    for where, factor, error in _noise_factors(subject, end) if len(end.asked) <= 1.2 * DRAWS[-1] else ():
        if abs(factor - 1) > 5 * error + 0.01:
            wrong.append(f"{factor:.2f} times the noise that its levels leave room for, {where}: {_much(factor)}")
            break
    if end.last < end.asked[-1][0]:
        error, euler = (one.item() for one in _defects([end.asked[-1], (end.last, end.end, 0.0)]))
        if error > 3 * euler:
            wrong.append(f"the last step has {error / euler:.2g} times the error of Euler's: noise is added after it")
    answer.wrong += wrong
    ends = [f"{row['distance']:.3f} at {row['steps']} steps" for row in (rows[0], rows[-1])]
    answer.found.append(f"distance from true samples {', '.join(ends)}")
    if subject.flux and not subject.stock:
        way = {"flow": "ve", "ve": "flow"}[subject.options.parameterization]
        second = Subject(subject.side, subject.family, subject.schedule, way)
        rows = draws(f"{subject.side.text}, parameterization {way}", functools.partial(own, second))
        if wrong and way == "ve" and not _judge_samples(rows, others, answer.true):
            answer.wrong.insert(
                0, 'parameterization "flow" adds its noise to the wrong process; with "ve" its samples are right'
            )


@functools.cache
def _chance() -> tuple[float, float]:
    """The distance of two true sets: the mean and the standard deviation over seeds."""
    pairs = [[KNOWN.sample(4000, torch.Generator().manual_seed(2 * i + j)) for j in (1, 2)] for i in range(8)]
    apart = torch.tensor([sliced_wasserstein(one, other, 128) for one, other in pairs])
    return apart.mean().item(), apart.std().item()


def _sampled(run: Run) -> Row:
    """What the samples of a run show."""
    end, true = run.end[0], KNOWN.sample(4000, torch.Generator().manual_seed(10**6))
    std = (torch.cov(end.T).trace() / KNOWN.covariance.trace()).sqrt().item()
    apart, within = sliced_wasserstein(end, true, 128), KNOWN.within(end, run.last)
    return {"evaluations": len(run.asked), "distance": apart, "std": std, "within": within}


def _judge_samples(rows: list[Row], others: list[list[Row]], true: tuple[float, float]) -> list[str]:
    """What is wrong with samples, beyond chance and what the steps explain by the other samplers.

    The spread goes to its limit as 1 / steps, or faster. Of 64,000 numbers chance is 1 / sqrt(128,000).
    """
    limit, *limits = (2 * one[-1]["within"] - one[-2]["within"] for one in (rows, *others))
    wrong = list[str]()
    explained = max(min(row[-1]["distance"] for row in others), true[0] + 4 * true[1])
    if not rows[-1]["distance"] < 1.5 * explained:
        wrong.append(f"its samples are {rows[-1]['distance']:.3f} from true ones, two true sets {true[0]:.3f}")
    if not abs(limit - 1) < 4 * math.sqrt(5 / 128000) + max(abs(one - 1) for one in limits):
        wrong.append(f"its samples' standard deviation goes to {limit:.2f} times the true one: {_much(limit)}")
    return wrong


def _much(factor: float) -> str:
    return "too much noise" if factor > 1 else "too little noise"


def _noise_factors(subject: Subject, run: Run) -> Iterator[tuple[str, float, float]]:
    """The noise of a step over what its levels leave room for, the median over all or some steps, and its error.

    A step from t to s makes a x + b_1 D_1 + b_2 D_2 + ... + r noise. Its noise is right if (a t)^2 + r^2 = s^2,
    whatever b: so much old noise is kept and so much is added. Least squares over the samples find a and r.
    """
    starts, factors = _states(subject, run, DRAWS[-1]), list[float]()
    for i, j in zip(starts[1:], starts[2:]):
        a, rest = _fit(run, i, j)
        t, s = run.asked[i][0], run.asked[j][0]
        if (room := s**2 - (a * t) ** 2) > 1e-3 * s**2:
            factors.append(math.sqrt(rest.square().mean().item() / room))
    third = len(factors) // 3
    parts = {"in all steps": factors, "in the first third of the steps": factors[:third]}
    parts |= {"in the second third": factors[third:-third], "in the last third": factors[-third:]}
    for where, some in parts.items():
        if len(some) >= 10:
            low, middle, high = torch.tensor(some).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
            yield where, middle, (high - low) / 2.56 * 1.25 / math.sqrt(len(some))


def _fit(run: Run, i: int, j: int, earlier: int = 2) -> tuple[float, torch.Tensor]:
    """The share a of x at evaluation i in x at evaluation j beside predictions, and what no prediction explains."""
    terms = [run.asked[i][1], *(KNOWN.split(x, 1 - t, t)[0] for t, x, _ in run.asked[max(i - earlier, 0) : j])]
    matrix, goal = torch.stack([term.flatten() for term in terms], 1), run.asked[j][1].flatten()
    weights = torch.linalg.lstsq(matrix, goal[:, None], driver="gelsd").solution[:, 0]
    return weights[0].item(), goal - matrix @ weights
