"""Every kind of run writes a card that the schema knows; the tree is that of the parents; what is edited, damaged or missing is said."""

import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llm_jax import checkpoint, cli, config, loop, saved, sharding
from llm_jax.errors import CheckpointError, UserError
from llm_jax.lifecycle import lineage, lineage_text
from llm_jax.lifecycle.card_schema import SCHEMA, check_card
from tests.lifecycle.life import live, tiny


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One device, and machine code that is not optimised."""
    make_mesh = sharding.make_mesh
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sharding,
            "make_mesh",
            lambda sizes=config.Mesh(), devices=None: make_mesh(config.Mesh(), devices or jax.devices()[:1]),
        )
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("life")
    live(root)
    return root


@pytest.fixture
def own(life: Path, tmp_path: Path) -> Path:
    """A copy of the life that may be spoilt."""
    return shutil.copytree(life, tmp_path / "life")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without runs and registry."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM_JAX_REGISTRY", raising=False)


def card(h: str, *parents: str, **more: Any) -> dict[str, Any]:
    model = {"architecture": "decoder", "vocab_size": 9, "layers": 1, "dim": 4, "heads": 1}
    return {
        "name": h[:1],
        "parents": list(parents),
        "transforms": [],
        "model": model,
        "hashes": {"params": h},
        **more,
    }


def digest(letter: str) -> str:
    return letter * 64


def put(folder: Path, stated: dict[str, Any]) -> Path:
    """A checkpoint's texts, without its arrays."""
    about = folder / "about"
    about.mkdir(parents=True)
    text = json.dumps(stated)
    (about / "card.json").write_text(text)
    (about / saved.SUMS).write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  card.json\n")
    return folder


def by_name(found: lineage.Lineage) -> dict[str, lineage.Version]:
    return {v.card["name"]: v for v in found.versions.values()}


def run(*arguments: Any) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(a) for a in arguments])
    return status, out.getvalue(), err.getvalue()


def test_every_kind_of_card_is_one(life: Path):
    places = [*(life / "made").iterdir(), *(life / "runs").iterdir()]
    assert {p.name for p in places} == {"base", "update", "pruned", "grown", "merged", "imported"}
    for place in places:
        assert check_card(saved.read_card(place)) == [], place


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda c: c.pop("parents"), "'parents' is a required property"),
        (lambda c: c["parents"].append("abc"), "parents/0: 'abc' does not match"),
        (lambda c: c["hashes"].pop("params"), "hashes: 'params' is a required property"),
        (lambda c: c["results"].update(loss="good"), "results/loss: 'good' is not of type"),
        (lambda c: c.pop("tokens"), "'tokens' is a dependency of 'step'"),
        (lambda c: c["model"].update(architecture="decodr"), "model/architecture: 'decodr' is not one of"),
        (lambda c: c["sources"]["sources"][0].pop("fingerprint"), "sources/sources/0: 'fingerprint' is a required"),
        (lambda c: c.update(step=-1), "step: -1 is less than the minimum"),
    ],
)
def test_what_is_no_card_is_told(life: Path, change, fault: str):
    stated = saved.read_card(life / "runs" / "base")
    change(stated)
    assert any(told.startswith(fault) for told in check_card(stated)), check_card(stated)


def test_cards_of_older_and_newer_versions_are_cards(life: Path):
    stated = saved.read_card(life / "runs" / "base")
    for newer in ("kept", "repeatable", "best"):
        stated.pop(newer)
    stated["config"]["data"].pop("group")
    assert check_card({**stated, "something_new": [1]}) == []
    assert SCHEMA["$schema"].startswith("https://json-schema.org/")


def test_the_tree_is_that_of_the_parents(life: Path):
    found = by_name(lineage.read([life]))
    assert set(found) == {"base", "update", "pruned", "grown", "merged"}
    of = {name: [next(n for n, w in found.items() if w.hash == h) for h in v.parents] for name, v in found.items()}
    assert of == {
        "base": [],
        "update": ["base"],
        "pruned": ["base"],
        "grown": ["pruned"],
        "merged": ["update", "base"],
    }
    assert list(found["update"].references.values()) == [found["base"].hash]
    assert [v.card["name"] for v in lineage.read([life]).ancestors(found["merged"].parents)] == ["update", "base"]


def test_weights_in_two_places_are_one_version_which_tells_how_they_were_made(life: Path):
    found = by_name(lineage.read([life, life / "runs", str(life / "made")]))
    assert [Path(place).name for place in found["base"].places] == ["imported", "2"]
    assert "step" in found["base"].card  # the run's card, not that of the import


def test_log_draws_it(life: Path):
    status, out, err = run("log", life)
    assert (status, err) == (0, "")
    names = {v.hash[:12]: v.card["name"] for v in lineage.read([life]).versions.values()}
    lines = [line for line in out.splitlines() if "●" in line]
    shape = [(line.index("●"), names[line.split("● ")[1][:12]]) for line in lines]
    assert shape == [(0, "base"), (2, "pruned"), (2, "grown"), (2, "update"), (2, "merged")]
    base = next(h for h, name in names.items() if name == "base")
    assert "NextToken, 2 steps  loss " in lines[0] and lines[0].endswith("and 1 more")
    assert f"teacher: {base} base" in lines[3] and f"also from {base} base" in lines[4]
    assert "grow_depth(3, how='stack')  " in lines[2] and "missing" not in out
    told = json.loads(run("log", life, "--json")[1])
    assert {v["name"] for v in told["versions"]} == set(names.values()) and told["missing"] == told["damaged"] == []


def test_a_missing_parent_is_a_node(own: Path):
    gone = by_name(lineage.read([own]))["pruned"].hash
    shutil.rmtree(own / "made" / "pruned")
    found = lineage.read([own])
    assert found.missing == (gone,)
    out = lineage_text.draw(found)
    assert f"● {gone[:12]}  missing\n│\n● " in out and out.splitlines()[-1].startswith("1 missing: ")


def test_an_edited_card_is_damaged_and_its_children_stay_under_it(own: Path):
    path = own / "made" / "pruned" / "about" / "card.json"
    before = by_name(lineage.read([own]))["pruned"].hash
    path.write_text(path.read_text().replace("prune(0.5)", "prune(0.9)"))
    found = lineage.read([own])
    assert [(each.hash, each.reason) for each in found.damaged] == [(before, "about/card.json is not what was written")]
    assert found.missing == ()
    out = lineage_text.draw(found)
    assert f"● {before[:12]}  damaged: " in out and out.index("damaged") < out.index("grown")
    status, _, err = run("show", own / "made" / "pruned")
    assert status == 2 and "about/card.json is not what was written" in err


def test_a_card_that_is_none_by_the_schema_is_told_by_log_and_show(tmp_path: Path):
    bad = put(tmp_path / "x" / "bad", {**card(digest("a")), "parents": "none"})
    (each,) = lineage.read([tmp_path / "x"]).damaged
    assert each.reason == "its card is not one: parents: 'none' is not of type 'array'" and each.hash == digest("a")
    for verb in (["show", bad], ["diff", bad, bad]):
        status, out, err = run(*verb)
        assert (status, out) == (2, "") and err == f"error: the card of {bad} is not one: {each.reason[21:]}\n"


@pytest.mark.parametrize("spoil", [lambda p: p.write_text("{"), lambda p: p.unlink(), lambda p: p.write_bytes(b"\xff")])
@pytest.mark.parametrize("name", ["card.json", "SHA256SUMS"])
def test_whatever_is_wrong_with_a_checkpoint_it_is_listed(tmp_path: Path, name: str, spoil):
    put(tmp_path / "x" / "good", card(digest("a")))
    bad = put(tmp_path / "x" / "bad", card(digest("b")))
    spoil(bad / "about" / name)
    found = lineage.read([tmp_path / "x"])
    assert list(found.versions) == [digest("a")]
    assert [each.place for each in found.damaged] == ["x/bad"] and found.damaged[0].reason


def test_edited_weights_are_found_by_hashing_them(own: Path):
    assert run("log", own, "--check")[0] == 0
    loaded, stated, tokenizer = _loaded(own / "made" / "pruned")
    other = jax.tree.map(lambda x: x + 1, loaded)
    checkpoint.save_params(own / "other", other, stated, tokenizer)
    arrays = own / "made" / "pruned" / "params"
    shutil.rmtree(arrays)
    shutil.copytree(own / "other" / "params", arrays)
    shutil.rmtree(own / "other")
    assert "edited" not in run("log", own)[1]
    status, out, err = run("log", own, "--check", "--json")
    (edited,) = json.loads(out)["edited"]
    assert edited["place"].endswith("made/pruned") and "the bits of 'params' are not those" in edited["reason"]
    assert status == 1 and err == "checkpoints that are not what was written: 1\n"


def _loaded(path: Path) -> tuple[Any, dict[str, Any], str | None]:
    from llm_jax import model

    stated = saved.read_card(path)
    abstract = model.abstract_params(model.model_config(stated, path), sharding.make_mesh())
    return checkpoint.load_params(path, abstract)


def test_of_a_run_the_last_checkpoint_and_those_that_are_named(tmp_path: Path):
    steps = tmp_path / "runs" / "r" / "checkpoints"
    for step, letter in ((1, "a"), (2, "b"), (3, "c")):
        put(steps / str(step), card(digest(letter)))
    put(steps / "4.damaged", card(digest("f")))
    put(tmp_path / "runs" / "r" / "checkpoints.orbax-checkpoint-tmp" / "5", card(digest("f")))
    assert list(lineage.read().versions) == [digest("c")]
    put(tmp_path / "runs" / "child", card(digest("d"), digest("a")))
    assert set(lineage.read().versions) == {digest("a"), digest("c"), digest("d")}
    (steps / "3" / "about" / "card.json").write_text("{}")
    found = lineage.read()
    assert set(found.versions) == {digest("a"), digest("b"), digest("d")} and len(found.damaged) == 1


def test_a_change_that_was_undone_and_a_run_of_no_steps_make_no_circle(tmp_path: Path):
    a, b = digest("a"), digest("b")
    put(tmp_path / "x" / "1", {**card(a, b), "name": "undone"})
    put(tmp_path / "x" / "2", {**card(a, a), "name": "itself"})
    put(tmp_path / "x" / "3", {**card(a), "name": "first"})
    put(tmp_path / "x" / "4", card(b, a))
    found = lineage.read([tmp_path / "x"])
    assert found.versions[a].card["name"] == "first" and len(found.versions[a].places) == 3
    assert [line[:9] for line in lineage_text.draw(found).splitlines()] == ["● aaaaaaa", "│", "● bbbbbbb"]


def test_a_circle_without_a_beginning_is_drawn_once(tmp_path: Path):
    a, b = digest("a"), digest("b")
    put(tmp_path / "x" / "1", card(a, b))
    put(tmp_path / "x" / "2", card(b, a))
    out = lineage_text.draw(lineage.read([tmp_path / "x"]))
    assert out.count("●") == 2
    assert {v.hash for v in lineage.read([tmp_path / "x"]).ancestors([a])} == {a, b}


def test_a_long_life_is_one_column(tmp_path: Path):
    hashes = [f"{i:064x}" for i in range(1, 1500)]
    versions = {
        h: lineage.Version(h, card(h, *hashes[:i][-1:]), (str(i),)) for i, h in enumerate(hashes)
    }  # deeper than Python recurses
    out = lineage_text.draw(lineage.Lineage(versions, (), {})).splitlines()
    assert len(out) == 2 * len(hashes) - 1 and all(line.startswith(("●", "│")) for line in out)


def test_branches(tmp_path: Path):
    a, b, c, d, e = map(digest, "abcde")
    for i, (h, *parents) in enumerate([(a,), (b, a), (c, a), (d, b), (e, c, digest("f"))]):
        put(tmp_path / "x" / str(i), card(h, *parents))
    lines = [
        line.split("  saved")[0].rstrip() for line in lineage_text.draw(lineage.read([tmp_path / "x"])).splitlines()
    ]
    assert lines[:7] == [
        f"● {a[:12]} a",
        f"├─● {b[:12]} b",
        "│ │",
        f"│ ● {d[:12]} d",
        f"└─● {c[:12]} c",
        "  │",
        f"  ● {e[:12]} e",
    ]
    assert lines[7] == f"● {digest('f')[:12]}  missing" and f"also from {'f' * 12} (not found)" in lineage_text.draw(
        lineage.read([tmp_path / "x"])
    )


def test_weights_of_another_project_that_a_run_started_from_are_no_missing_parent(life: Path, tmp_path: Path):
    stated = saved.read_card(life / "runs" / "base")
    stated |= {"huggingface": {"config": {"model_type": "llama"}}, "parents": [digest("b")]}
    for start, missing in (("asset:minilm", ()), (str(life / "directory"), ()), ("gone", (digest("b"),))):
        stated["config"]["start"] = start
        put(tmp_path / "x" / start.replace("/", "-"), stated)
        found = lineage.read([tmp_path / "x"])
        assert found.missing == missing
        if not missing:
            assert f"● {'b' * 12}  {start}\n│\n● " in lineage_text.draw(found)
        shutil.rmtree(tmp_path / "x")


def test_names_of_the_registry_stand_beside_what_they_name(life: Path, tmp_path: Path):
    from llm_jax.lifecycle.registry import Registry

    Registry("registry").promote("production", life / "made" / "grown", force=True, why="a test")
    status, out, _ = run("log", life, "registry")
    assert status == 0
    (line,) = [line for line in out.splitlines() if "[production]" in line]
    assert "grown [production]" in line and "and 1 more" in line
    assert "[production]" in run("log")[1]  # the registry alone is looked into
    assert "grown" in run("show", "registry:production")[1]
    shutil.rmtree(tmp_path / "registry" / "models")
    found = lineage.read(["registry"])
    assert len(found.missing) == 1 and "[production]  missing" in lineage_text.draw(found)


def test_show(life: Path):
    status, out, err = run("show", life / "runs" / "update")
    assert (status, err) == (0, "")
    stated = saved.read_card(life / "runs" / "update")
    rows = [line.split(maxsplit=1) for line in out.splitlines()]
    assert ["hash", stated["hashes"]["params"]] in rows and ["parent", stated["parents"][0]] in rows
    assert ["loss", f"{stated['results']['loss']:.6g}"] in rows
    assert json.loads(run("show", life / "runs" / "update", "--json")[1]) == stated
    out = run("show", life / "made" / "pruned")[1]
    assert "decoder/layers/mlp/up: 50.00% zeros" in out and "in the last run before" in out and "loss" not in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "there is neither runs nor registry here: name the folders to look in"),
        (["nowhere"], "nowhere: no such folder"),
        (["file"], "file: a file, not a folder"),
        (["--chek"], "unknown argument '--chek'; did you mean '--check'?"),
    ],
)
def test_what_a_user_gets_wrong(tmp_path: Path, arguments: list[str], message: str):
    (tmp_path / "file").write_text("")
    assert run("log", *arguments) == (2, "", f"error: {message}\n")


def test_a_folder_without_checkpoints(tmp_path: Path):
    (tmp_path / "x").mkdir()
    assert run("log", "x") == (0, "no checkpoint\n", "")


def test_links_that_go_round_are_walked_once(tmp_path: Path):
    put(tmp_path / "x" / "a", card(digest("a")))
    (tmp_path / "x" / "round").symlink_to(tmp_path / "x")
    (tmp_path / "x" / "again").symlink_to(tmp_path / "x" / "a")
    assert lineage.read([tmp_path / "x"]).versions[digest("a")].places == ("x/a",)


def test_a_checkpoint_itself_may_be_named(life: Path):
    assert len(lineage.read([life / "made" / "merged"]).missing) == 2
    with pytest.raises(UserError, match="no such folder"):
        lineage.read([life / "made" / "nothing"])
    with pytest.raises(CheckpointError, match="no such file"):
        lineage.read_card(life / "made" / "nothing")


@pytest.mark.slow
def test_a_run_from_a_directory_and_its_continuation(own: Path):
    """The run's parent is the hash of what was read, which is that of the same directory imported; continued, it is still one version."""
    run_of = tiny(own, "onwards", start=str(own / "directory"), model=None, steps=1)
    loop.train(run_of)
    loop.train(run_of)
    found = by_name(lineage.read([own]))
    assert check_card(found["onwards"].card) == []
    assert found["onwards"].parents == (found["base"].hash,) and len(found["onwards"].places) == 1
    assert jnp.isfinite(found["onwards"].card["results"]["loss"])
