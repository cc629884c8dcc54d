"""Whether a model may take the place of another: non-inferior on every check of a suite, no slice that lost, within the limits.

Errors of the verdict. A candidate that has lost a margin passes a check with a chance of `level` at most; it must pass all, so that the chance
that one with any such loss passes is no greater, whatever their number: no correction is due (intersection-union test; Berger 1982). Refusing for
a slice is the other way round: any of many may refuse, so that their p-values are corrected for their number (Holm 1979), and a slice is refused
where it is worse than the incumbent beyond chance and by more than its margin.
"""

import datetime
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from llm_jax import cost, model, tree
from llm_jax.card import content_hash
from llm_jax.errors import UserError, choose
from llm_jax.lifecycle.paired import Paired, compare
from llm_jax.lifecycle.scored import Scored
from llm_jax.lifecycle.suite import Check, Harness, Limits, Suite
from llm_jax.lifecycle.two_samples import holm
from llm_jax.model import Model

FLIPS = 20
"""Examples of each check that a verdict keeps"""

SHOWN = 200
"""Characters of such an example"""


class RefusedVerdictError(UserError):
    """The gate refused."""

    status = 1


def gate(candidate: str, incumbent: str | None, suite: Suite) -> dict[str, Any]:
    """The verdict on a model, against the one that it would replace, or by bounds and limits alone where it would replace none.

    Raises:
        UserError: models or sources that cannot be read, a task that a model has no head for, documents that one of them cannot read.
    """
    new = model.load(candidate)
    old = None if incumbent is None else model.load(incumbent)
    one = old is not None and _identity(old) == _identity(new)
    pairs = []
    for check in suite.checks:
        after = check.score(new)
        before = after if one else None if old is None else check.score(old)
        if old is not None and before is not None:
            check.same_units(after, old, new)
            _check_same(check, before, after)
        pairs.append((before, after))
    rows, slices, flips = judge(suite, pairs)
    limits = _limits(suite.limits, old, new)
    reasons = [x["reason"] for x in (*rows, *slices, *limits) if not x["passed"]]
    verdict = {
        "candidate": _hash(new),
        "incumbent": None if old is None else _hash(old),
        "suite": suite.fingerprint(),
        "passed": not reasons,
        "rows": rows,
        "slices": slices,
        "limits": limits,
        "reasons": reasons,
        "flips": flips,
        "paths": {"candidate": candidate, "incumbent": incumbent},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
    }
    identity = hashlib.sha256(json.dumps(verdict, sort_keys=True).encode()).hexdigest()[:12]
    return {"id": identity, **verdict}


def judge(
    suite: Suite, pairs: Sequence[tuple[Scored | None, Scored]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """The verdicts on checks and slices, and what flipped, by what incumbent and candidate made of each check's documents."""
    rows, slices, flips = [], [], {}
    for check, (before, after) in zip(suite.checks, pairs, strict=True):
        rows.append(_row(check, before, after, suite.level))
        if "difference" in rows[-1]:
            assert before is not None
            slices += _slices(check, before, after)
            flips[check.name] = _flips(check, before, after)
    _judge_slices(slices, suite.level)
    return rows, slices, flips


def _hash(loaded: Model) -> str:
    return loaded.card.get("hashes", {}).get("params") or content_hash(loaded.params)


def _identity(loaded: Model) -> tuple[Any, ...]:
    """What makes a model the same one: two that share it need not be measured apart."""
    return _hash(loaded), loaded.config, None if loaded.tokenizer is None else loaded.tokenizer.fingerprint


def _check_same(check: Check | Harness, before: Scored, after: Scored) -> None:
    """Raise unless the figures are of the same documents."""
    ids = [[str(record["id"]) for record in side.records] for side in (before, after)]
    if ids[0] != ids[1]:
        odd = sorted(set(ids[0]) ^ set(ids[1]))
        raise UserError(f"check {check.name!r}: {odd[0] if odd else 'a document'} is read by one of the models alone")
    if check.metric == "loss" and before.correct is None and not np.array_equal(before.weight, after.weight):
        at = int(np.flatnonzero(before.weight != after.weight)[0])
        raise UserError(
            f"check {check.name!r}: of {after.records[at]['id']} the incumbent predicts {before.weight[at]:g} tokens, the candidate "
            f"{after.weight[at]:g}: set data.long='split', or batch.length to what both can hold"
        )


def _groups(check: Check | Harness, scored: Scored) -> np.ndarray | None:
    """(N,) the number of each document's group."""
    if not check.group:
        return None
    choose(f"check {check.name!r}: group", check.group, set().union(*scored.records) - {"id"}, UserError)
    values = [record.get(check.group) for record in scored.records]
    named = [f"of none {i}" if value is None else f"of {value}" for i, value in enumerate(values)]
    return np.unique(named, return_inverse=True)[1]


def paired(check: Check | Harness, before: Scored, after: Scored) -> Paired:
    """How much worse the candidate is on a check; a model is what it is, however few documents there are."""
    if before is after:
        groups = _groups(check, after)
        return Paired(len(after), len(after) if groups is None else len(np.unique(groups)), 0.0, 0.0)
    old, weights = check.figures(before)
    new, _ = check.figures(after)
    return compare(check.sign * old, check.sign * new, weights, _groups(check, after))


def _row(check: Check | Harness, before: Scored | None, after: Scored, level: float) -> dict[str, Any]:
    """The verdict of a check on all its documents."""
    row = {"check": check.name, "unit": check.unit, "margin": check.margin, "documents": len(after)}
    broken = [
        _broken(check, side, name)
        for side, name in ((before, "incumbent"), (after, "candidate"))
        if side is not None and not np.isfinite(side.loss).all()
    ]
    if broken:
        return {**row, "candidate": None, "passed": False, "reason": "; ".join(broken)}
    mean = _mean(check, after)
    outside = check.bound is not None and check.sign * mean > check.sign * check.bound
    reasons = [f"{check.name}: {mean:.4f} {check.unit}, the suite asks for {check.bound}"] if outside else []
    row |= {"candidate": mean}
    if before is not None:
        found = paired(check, before, after)
        low, high = found.interval(level)
        row |= {"incumbent": _mean(check, before), "groups": found.groups, "difference": found.difference}
        row |= {"low": low, "high": high} if math.isfinite(high) else {"low": None, "high": None}
        if high >= check.margin:
            reasons.append(_too_much(check, found, low, high, level))
    return {**row, "passed": not reasons, "reason": "; ".join(reasons)}


def _mean(check: Check | Harness, scored: Scored) -> float:
    value, weights = check.figures(scored)
    return float(np.average(value, weights=weights))


def _broken(check: Check | Harness, scored: Scored, side: str) -> str:
    """The reason where a figure is no number, as that of a model whose training blew up."""
    at = np.flatnonzero(~np.isfinite(scored.loss))
    return f"{check.name}: the {side} gives no number for {len(at)} documents, {scored.records[at[0]]['id']} first"


def _too_much(check: Check | Harness, found: Paired, low: float, high: float, level: float) -> str:
    """The reason where a margin is lost, or may be."""
    if not math.isfinite(high):
        return f"{check.name}: cannot be told: all documents are of one group, {check.group!r}"
    said = f"{check.name}: worse by {found.difference:+.4f} ({low:+.4f} to {high:+.4f}), margin {check.margin:g}"
    if low >= check.margin:
        return said
    more = found.needed(check.margin, level) - found.documents
    told = f", about {more} documents more would tell" if more > 0 else ""
    return f"{said}: a loss of that size is not excluded{told}"


def _value(record: dict[str, Any], field: str) -> str:
    """The slice of a record by `FIELD`, or by the first characters of it, `FIELD:N`."""
    name, _, count = field.partition(":")
    if name not in record:
        raise UserError(f"{record['id']}: no field {name!r} to slice by; it has {', '.join(sorted(record))}")
    return str(record[name])[: int(count) if count else None]


def _slices(check: Check | Harness, before: Scored, after: Scored) -> list[dict[str, Any]]:
    """What each slice with enough documents lost; still without a verdict."""
    found = []
    for field in check.slices:
        values = np.array([_value(record, field) for record in after.records])
        for value in np.unique(values):
            chosen = values == value
            if chosen.sum() < check.least:
                continue
            pair = paired(check, before[chosen], after[chosen])
            margin = check.slice_margin or 2 * check.margin
            named = {"check": check.name, "slice": f"{field}={value}", "documents": pair.documents, "margin": margin}
            found.append({**named, "difference": pair.difference, "p": pair.p_worse()})
    return found


def _judge_slices(slices: list[dict[str, Any]], level: float) -> None:
    """Put the verdict beside what each slice lost."""
    for each, p in zip(slices, holm([x["p"] for x in slices])):
        lost = each["difference"] > each["margin"] and p < level
        reason = (
            f"{each['check']}, {each['slice']}: {each['documents']} documents lost {each['difference']:.4f}, "
            f"margin {each['margin']:g}, corrected p {p:.2g}"
        )
        each.update(corrected=p, passed=not lost, reason=reason if lost else "")


def _limits(limits: Limits, old: Model | None, new: Model) -> list[dict[str, Any]]:
    """What is limited, measured."""
    found = []
    if limits.parameters:
        found.append(("parameters", float(tree.size(new.params)), limits.parameters))
    if old is not None and limits.size:
        found.append(("size", _bytes(new) / _bytes(old), limits.size))
    if old is not None and (limits.latency or limits.memory):
        most = [each.config.max_length for each in (old, new) if each.config.positions == "learned"]
        shape = (limits.rows, min([limits.length, *most]))
        if limits.latency:
            found.append(("latency", _latency(old, new, shape), limits.latency))
        if limits.memory:
            used = [cost.peak_memory(each.config, shape) for each in (old, new)]
            found.append(("memory", used[1] / used[0], limits.memory))
    return [
        {"name": name, "value": value, "limit": limit, "passed": value <= limit}
        | {"reason": "" if value <= limit else f"{name}: {value:.4g}, limit {limit:g}"}
        for name, value, limit in found
    ]


def _latency(old: Model, new: Model, shape: tuple[int, int]) -> float:
    """Time of a forward pass over that of the incumbent; 1 without a measurement where the two are one program, which noise tells apart at most."""
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), each.params) for each in (old, new)]
    if old.config == new.config and kinds[0] == kinds[1]:
        return 1.0
    measured = cost.compare(old.config, new.config, shape, old.params, new.params)
    return measured.after.seconds / measured.before.seconds


def _bytes(loaded: Model) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(loaded.params))


def _flips(check: Check | Harness, before: Scored, after: Scored) -> dict[str, Any]:
    """The documents that a class was found for by one of the models alone, those that were lost first, or whose loss rose most."""
    old, new = check.figures(before)[0], check.figures(after)[0]
    worse = check.sign * (new - old)
    order = [
        int(i) for i in np.argsort(-worse, kind="stable") if worse[i] > 0 or (check.metric == "accuracy" and worse[i])
    ]
    examples = [
        {
            "id": str(after.records[i]["id"]),
            "text": str(after.records[i].get(check.text, ""))[:SHOWN],
            "incumbent": float(old[i]),
            "candidate": float(new[i]),
        }
        | ({"said": [before.said[i], after.said[i]]} if after.said else {})
        for i in order[:FLIPS]
    ]
    return {"worse": int((worse > 0).sum()), "better": int((worse < 0).sum()), "examples": examples}


def _told(example: dict[str, Any]) -> str:
    """What the two models said of an example, or its figures."""
    return " -> ".join(example.get("said") or [f"{example[side]:.4g}" for side in ("incumbent", "candidate")])


def told(verdict: dict[str, Any]) -> str:
    """A verdict as tables: checks, slices that lost, limits, reasons, and examples that flipped."""
    lines = [
        f"{'check':<20}{'documents':>10}{'incumbent':>11}{'candidate':>11}{'worse by':>10}  {'interval':<20}{'margin':>8}"
    ]
    for row in verdict["rows"]:
        pair = ""
        if "difference" in row:
            interval = "unknown" if row["high"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
            pair = f"{row['difference']:>+10.4f}  {interval:<20}{row['margin']:>8g}"
        before = f"{row['incumbent']:>11.4f}" if "incumbent" in row else f"{'-':>11}"
        passed = "passed" if row["passed"] else "REFUSED"
        after = f"{'-':>11}" if row["candidate"] is None else f"{row['candidate']:>11.4f}"
        lines.append(f"{row['check']:<20}{row['documents']:>10}{before}{after}{pair:<48}  {passed}")
    lost = [x for x in verdict["slices"] if not x["passed"]]
    lines.append(f"{len(verdict['slices'])} slices, {len(lost)} of them lost too much")
    lines += [f"    {x['slice']:<24}{x['documents']:>6} documents lost {x['difference']:.4f}" for x in lost]
    lines += [
        f"{x['name']:<20}{x['value']:>21.4g}, limit {x['limit']:g}  {'passed' if x['passed'] else 'REFUSED'}"
        for x in verdict["limits"]
    ]
    for name, flips in verdict["flips"].items():
        lines.append(f"{name}: {flips['worse']} documents worse, {flips['better']} better")
        if not verdict["passed"]:
            lines += [f"    {_told(x)}  {x['id']}  {x['text'][:60]!r}" for x in flips["examples"][:5]]
    lines += [f"refused: {reason}" for reason in verdict["reasons"]] or ["passed"]
    return "\n".join(lines)
