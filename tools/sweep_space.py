"""What a sweep runs: knobs with their values or ranges, and every setting they stand for.

The script itself checks all of it before anything starts. A *setting* is an environment without
SEED; a run is a setting with a seed.
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

SET_BY_SWEEP = ("RUN_ID", "ARTIFACT_DIR")  # what tells runs apart
MOST_DRAWS = 200  # settings that TPE may propose before there is nothing new to propose


class Refused(Exception):
    """Wrong usage. The message is all the user sees, a line per problem; exit status 2."""


# === Knobs ========================================================================================


class Knob(NamedTuple):
    """A knob of the command line: listed values, or a range to search."""

    name: str
    values: tuple[str, ...]  # as the environment wants them; () of a range
    span: tuple[float, ...] = ()  # low and high of a range
    log: bool = False  # whether values or range are spaced evenly in the logarithm

    @classmethod
    def parse(cls, text: str) -> Knob:
        """Reads NAME=a,b,c, or NAME=log:low:high or lin:low:high, with :count for so many values.

        Raises Refused if the text has none of these forms.
        """
        name, equals, value = text.partition("=")
        kind, *bounds = value.split(":")
        if kind in ("log", "lin"):
            return cls.parse_range(text, name, kind, bounds)
        values = tuple(value.split(","))
        if not name or not equals or "" in values or len(set(values)) < len(values):
            raise Refused(
                f"{text}: must be NAME=value,value.. without repeats, "
                "or NAME=log:low:high, lin:low:high"
            )
        return cls(name, values)

    @classmethod
    def parse_range(cls, text: str, name: str, kind: str, bounds: list[str]) -> Knob:
        """Reads the bounds of a range and, where there is a third, a count. May raise Refused."""
        refusal = Refused(
            f"{text}: must be {kind}:low:high or {kind}:low:high:count, low below high, log above 0"
        )
        if len(bounds) not in (2, 3):
            raise refusal
        try:
            low = float(bounds[0])
            high = float(bounds[1])
            count = int(bounds[2]) if len(bounds) == 3 else None
        except ValueError:
            raise refusal from None
        if not low < high < math.inf or (kind == "log" and low <= 0):
            raise refusal
        if count is None:
            return cls(name, (), (low, high), kind == "log")
        if count < 2:
            raise refusal
        values = []
        for i in range(count):
            share = i / (count - 1)
            if kind == "log":
                point = low * (high / low) ** share
            else:
                point = low + (high - low) * share
            values.append(f"{point:.4g}")
        return cls(name, tuple(values), log=kind == "log")


# === The space of settings ========================================================================


class Space:
    """Every run that the command stands for, checked by the script's own configuration."""

    def __init__(self, script: ModuleType, knobs: list[Knob], base: dict[str, str], has_cuda: bool):
        """`base`: the knobs that the environment sets for every run."""
        self.script = script
        self.knobs = knobs
        self.base = base
        self.has_cuda = has_cuda
        self.fields = script.Config.__dataclass_fields__
        self.seeds = next((knob.values for knob in knobs if knob.name == "SEED"), ())
        self.searched = [knob for knob in knobs if knob.name != "SEED"]

    # --- Checks ---

    def config(self, env: dict[str, str]) -> Any:
        """The script's configuration of a run. Raises the script's UsageError if it refuses."""
        inherited = {k: v for k, v in os.environ.items() if k not in SET_BY_SWEEP}
        full = {**inherited, "RUN_ID": "sweep", **self.base, **env}
        return self.script.Config.from_env(full, self.has_cuda)[0]

    def check(self) -> Any:
        """The configuration of the first combination.

        Raises Refused, with all problems at once, if the script would refuse one of them.
        """
        self.check_knobs()
        known = {name.upper() for name in self.fields}
        unknown = [self.unknown_knob(knob) for knob in self.knobs if knob.name not in known]
        names = [knob.name for knob in self.knobs]
        configs = []
        problems: dict[str, None] = {}
        for values in itertools.product(*map(self.extremes, self.knobs)):
            try:
                configs.append(self.config(dict(zip(names, values, strict=True))))
            except self.script.UsageError as error:
                problems |= dict.fromkeys(str(error).splitlines())
        if unknown or problems:
            # The script names unknown knobs too; the lines above do it better.
            others = [problem for problem in problems if ": not a knob; " not in problem]
            raise Refused("\n".join([*unknown, *others]))
        return configs[0]

    def check_knobs(self) -> None:
        """Raises Refused for a knob that no sweep can take."""
        names = [knob.name for knob in self.knobs]
        for knob in self.knobs:
            if knob.name in SET_BY_SWEEP:
                raise Refused(f"{knob.name}: set by the sweep, a different one for every run")
            if names.count(knob.name) > 1:
                raise Refused(f"{knob.name}: given more than once")
            if knob.span and not isinstance(self.default(knob.name), (int, float)):
                raise Refused(f"{knob.name}: has no range; list its values")

    def unknown_knob(self, knob: Knob) -> str:
        """The problem of a misspelt knob, with the nearest name there is."""
        near = difflib.get_close_matches(knob.name.lower(), self.fields, n=1, cutoff=0.6)
        hint = f"did you mean {near[0].upper()}?" if near else "train_gpt.py --knobs lists them"
        return f"{knob.name}: not a knob of {Path(self.script.__file__).name}; {hint}"

    # --- Values ---

    def default(self, name: str) -> Any:
        """A knob's default, for its type; "" of an unknown one."""
        return getattr(self.fields.get(name.lower()), "default", "")

    def is_numeric(self, name: str) -> bool:
        """Whether a knob is a number and no switch."""
        default = self.default(name)
        return isinstance(default, (int, float)) and not isinstance(default, bool)

    def text(self, knob: Knob, value: float) -> str:
        """A number of a range as the environment wants it: four digits, inside the range."""
        if isinstance(self.default(knob.name), int):
            return str(round(value))
        low, high = knob.span
        rounded = float(f"{value:.4g}")
        return f"{min(max(rounded, low), high):.10g}"

    def extremes(self, knob: Knob) -> tuple[str, ...]:
        """The values at which a knob is checked: all that are listed, or both ends of a range."""
        return knob.values or tuple(self.text(knob, end) for end in knob.span)

    def settings(self) -> list[dict[str, str]]:
        """The settings of a grid: every combination of the knobs other than SEED."""
        names = [knob.name for knob in self.searched]
        combinations = itertools.product(*(knob.values for knob in self.searched))
        return [dict(zip(names, values, strict=True)) for values in combinations]

    # --- Optuna ---

    def distribution(self, knob: Knob, low: float, high: float) -> Any:
        """Optuna's interval for a numeric knob, of integers or of floating-point numbers."""
        from optuna.distributions import FloatDistribution, IntDistribution

        is_int = type(self.default(knob.name)) is int
        return (IntDistribution if is_int else FloatDistribution)(low, high, log=knob.log)

    def shown(self, env: dict[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """(parameters, distributions) of a run for Optuna and its dashboard: numbers as numbers.

        Bounds may move as values are added, so numeric knobs are intervals even when listed.
        """
        from optuna.distributions import CategoricalDistribution

        parameters = {}
        distributions = {}
        for knob in self.knobs:
            text = env[knob.name]
            default = self.default(knob.name)
            if self.is_numeric(knob.name):
                number = type(default)
                points = [number(value) for value in (*knob.values, *knob.span, text)]
                parameters[knob.name] = number(text)
                distributions[knob.name] = self.distribution(knob, min(points), max(points))
                continue
            choices = self.fields[knob.name.lower()].metadata["choices"] or knob.values
            if isinstance(default, bool):
                choices = ("0", "1")
            parameters[knob.name] = text
            distributions[knob.name] = CategoricalDistribution(choices)
        return parameters, distributions

    def propose(
        self, seen: list[tuple[dict[str, str], float | None]], seed: int, startup: int
    ) -> dict[str, str]:
        """TPE's next setting, {} if it finds nothing new.

        `seen`: each setting with its mean val_bpb, inf if it failed, None while it runs. Seeds are
        no dimension: TPE must not learn which seed is lucky. It is told that what the script would
        refuse is bad. The first `startup` settings are random.
        """
        proposer = Proposer(self, seed, startup)
        for setting, value in seen:
            proposer.add(setting, value)
        old = [setting for setting, _ in seen]
        for _ in range(MOST_DRAWS):
            setting = proposer.draw()
            try:
                self.config(setting)
            except self.script.UsageError:
                proposer.add(setting, math.inf)
                continue
            if setting not in old:
                return setting
        return {}


class Proposer:
    """A study in memory that holds one trial per setting, for TPE to learn from."""

    def __init__(self, space: Space, seed: int, startup: int):
        """Starts without any setting."""
        import optuna

        self.space = space
        self.optuna = optuna
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True
        )
        self.study = optuna.create_study(sampler=sampler)
        self.distributions = {knob.name: self.distribution(knob) for knob in space.searched}

    def distribution(self, knob: Knob) -> Any:
        """What TPE draws a knob from: the range, or the listed values as mere names."""
        if not knob.span:
            return self.optuna.distributions.CategoricalDistribution(knob.values)
        number = type(self.space.default(knob.name))
        low, high = map(number, knob.span)
        return self.space.distribution(knob, low, high)

    def add(self, setting: dict[str, str], value: float | None) -> None:
        """Tells TPE a setting's mean: inf if it failed, None while it runs."""
        parameters = {}
        for knob in self.space.searched:
            text = setting[knob.name]
            number = type(self.space.default(knob.name))
            parameters[knob.name] = number(text) if knob.span else text
        states = self.optuna.trial.TrialState
        outcome: dict[str, Any] = {"state": states.PRUNED}
        if value is None:
            outcome = {"state": states.RUNNING}
        elif math.isfinite(value):
            outcome = {"state": states.COMPLETE, "value": value}
        trial = self.optuna.trial.create_trial(
            params=parameters, distributions=self.distributions, **outcome
        )
        self.study.add_trial(trial)

    def draw(self) -> dict[str, str]:
        """A setting that TPE proposes, as the environment wants it."""
        drawn = self.study.ask(self.distributions).params
        setting = {}
        for knob in self.space.searched:
            value = drawn[knob.name]
            setting[knob.name] = self.space.text(knob, value) if knob.span else value
        return setting
