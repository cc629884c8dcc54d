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
from typing import Any

import jax
import numpy as np

from llm_jax import cost, model, tree
from llm_jax.card import content_hash
from llm_jax.errors import UserError
from llm_jax.lifecycle.paired import Paired, compare
from llm_jax.lifecycle.scored import Scored, score_documents
from llm_jax.lifecycle.suite import UNITS, Check, Limits, Suite
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
    rows, slices, flips = [], [], {}
    for check in suite.checks:
        after = score_documents(new, check.task, check.data, check.batch)
        before = None if old is None else score_documents(old, check.task, check.data, check.batch)
        if before is not None:
            _check_same(check, old, new, before, after)
            slices += _slices(check, before, after)
            flips[check.name] = _flips(check, before, after)
        rows.append(_row(check, before, after, suite.level))
    _judge_slices(slices, suite.level)
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


def _hash(loaded: Model) -> str:
    return loaded.card.get("hashes", {}).get("params") or content_hash(loaded.params)


def _check_same(check: Check, old: Model | None, new: Model, before: Scored, after: Scored) -> None:
    """Raise unless the two figures can be paired."""
    assert old is not None and old.tokenizer is not None and new.tokenizer is not None
    if check.metric == "loss" and after.correct is None and old.tokenizer.fingerprint != new.tokenizer.fingerprint:
        raise UserError(
            f"check {check.name!r}: the models have different tokenizers, so that losses a token differ: metric='bits'"
        )
    ids = [[str(record["id"]) for record in side.records] for side in (before, after)]
    if ids[0] != ids[1]:
        odd = sorted(set(ids[0]) ^ set(ids[1]))
        raise UserError(f"check {check.name!r}: {odd[0] if odd else 'a document'} is read by one of the models alone")


def _figures(check: Check, scored: Scored) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the metric of each document, and its weight in the mean."""
    if check.metric == "accuracy":
        if scored.correct is None:
            raise UserError(f"check {check.name!r}: a task without classes has no accuracy: metric='loss'")
        return scored.correct, np.ones(len(scored))
    if check.metric == "bits":
        return scored.loss / math.log(2) / scored.bytes, scored.bytes
    return scored.loss / scored.weight, scored.weight


def _groups(check: Check, scored: Scored) -> np.ndarray | None:
    """(N,) the number of each document's group."""
    if not check.group:
        return None
    named = [str(record.get(check.group, record["id"])) for record in scored.records]
    return np.unique(named, return_inverse=True)[1]


def paired(check: Check, before: Scored, after: Scored) -> Paired:
    """How much worse the candidate is on a check."""
    old, weights = _figures(check, before)
    new, _ = _figures(check, after)
    return compare(check.sign * old, check.sign * new, weights, _groups(check, after))


def _row(check: Check, before: Scored | None, after: Scored, level: float) -> dict[str, Any]:
    """The verdict of a check on all its documents."""
    value, weights = _figures(check, after)
    mean = float(np.average(value, weights=weights))
    unit = UNITS[check.metric]
    row = {"check": check.name, "unit": unit, "margin": check.margin, "documents": len(after), "candidate": mean}
    outside = check.bound is not None and check.sign * mean > check.sign * check.bound
    reasons = [f"{check.name}: {mean:.4f} {unit}, the suite asks for {check.bound}"] if outside else []
    if before is not None:
        found = paired(check, before, after)
        low, high = found.interval(level)
        row |= {"incumbent": float(np.average(_figures(check, before)[0], weights=weights)), "groups": found.groups}
        row |= {"difference": found.difference, "low": low, "high": high}
        if high >= check.margin:
            reasons.append(_too_much(check, found, low, high, level))
    return {**row, "passed": not reasons, "reason": "; ".join(reasons)}


def _too_much(check: Check, found: Paired, low: float, high: float, level: float) -> str:
    said = f"{check.name}: worse by {found.difference:+.4f} ({low:+.4f} to {high:+.4f}), margin {check.margin:g}"
    if low >= check.margin:
        return said
    more = found.needed(check.margin, level)
    return f"{said}: a loss of that size is not excluded" + (f", which takes about {more} documents" if more else "")


def _value(record: dict[str, Any], field: str) -> str:
    """The slice of a record by `FIELD`, or by the first characters of it, `FIELD:N`."""
    name, _, count = field.partition(":")
    if name not in record:
        raise UserError(f"{record['id']}: no field {name!r} to slice by; it has {', '.join(sorted(record))}")
    return str(record[name])[: int(count) if count else None]


def _slices(check: Check, before: Scored, after: Scored) -> list[dict[str, Any]]:
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
        shape = (limits.rows, limits.length)
        if limits.latency:
            measured = cost.compare(old.config, new.config, shape, old.params, new.params)
            found.append(("latency", measured.after.seconds / measured.before.seconds, limits.latency))
        if limits.memory:
            used = [cost.peak_memory(each.config, shape) for each in (old, new)]
            found.append(("memory", used[1] / used[0], limits.memory))
    return [
        {"name": name, "value": value, "limit": limit, "passed": value <= limit}
        | {"reason": "" if value <= limit else f"{name}: {value:.4g}, limit {limit:g}"}
        for name, value, limit in found
    ]


def _bytes(loaded: Model) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(loaded.params))


def _flips(check: Check, before: Scored, after: Scored) -> dict[str, Any]:
    """The documents that a class was found for by one of the models alone, those that were lost first, or whose loss rose most."""
    old, new = _figures(check, before)[0], _figures(check, after)[0]
    worse = check.sign * (new - old)
    order = [
        int(i) for i in np.argsort(-worse, kind="stable") if worse[i] > 0 or (check.metric == "accuracy" and worse[i])
    ]
    examples = [
        {
            "id": str(after.records[i]["id"]),
            "text": str(after.records[i].get(check.data.text, ""))[:SHOWN],
            "incumbent": float(old[i]),
            "candidate": float(new[i]),
        }
        for i in order[:FLIPS]
    ]
    return {"worse": int((worse > 0).sum()), "better": int((worse < 0).sum()), "examples": examples}


def told(verdict: dict[str, Any]) -> str:
    """A verdict as tables: checks, slices that lost, limits, reasons, and examples that flipped."""
    lines = [
        f"{'check':<20}{'documents':>10}{'incumbent':>11}{'candidate':>11}{'worse by':>10}  {'interval':<20}{'margin':>8}"
    ]
    for row in verdict["rows"]:
        pair = ""
        if "difference" in row:
            interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
            pair = f"{row['difference']:>+10.4f}  {interval:<20}{row['margin']:>8g}"
        before = f"{row['incumbent']:>11.4f}" if "incumbent" in row else f"{'-':>11}"
        passed = "passed" if row["passed"] else "REFUSED"
        lines.append(f"{row['check']:<20}{row['documents']:>10}{before}{row['candidate']:>11.4f}{pair:<48}  {passed}")
    lost = [x for x in verdict["slices"] if not x["passed"]]
    lines.append(f"{len(verdict['slices'])} slices, {len(lost)} of them lost too much")
    lines += [
        f"{x['name']:<20}{x['value']:>21.4g}, limit {x['limit']:g}  {'passed' if x['passed'] else 'REFUSED'}"
        for x in verdict["limits"]
    ]
    for name, flips in verdict["flips"].items():
        lines.append(f"{name}: {flips['worse']} documents worse, {flips['better']} better")
        if not verdict["passed"]:
            lines += [
                f"    {x['incumbent']:.4g} -> {x['candidate']:.4g}  {x['id']}  {x['text'][:60]!r}"
                for x in flips["examples"][:5]
            ]
    lines += [f"refused: {reason}" for reason in verdict["reasons"]] or ["passed"]
    return "\n".join(lines)
