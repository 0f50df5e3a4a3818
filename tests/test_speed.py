"""Races as users meet them: equal work or no comparison, outcomes kept whole, refusals in one line."""
import json
from dataclasses import replace

import pytest
import torch

from arm.app.cli import main
from arm.app.bench import RACES, bench, bench_table, loss_memory, save_bench, training
from arm.app.speed import Outcome, by_columns, generation, race, sized, twin
from arm.core import save_tensors
from arm.model.generate import generate_text


def test_the_command_prints_a_table_and_keeps_the_outcomes(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(RACES, "loss", lambda r: [loss_memory(128, 16)])
    file = tmp_path/"bench.json"
    assert main(["bench", "loss", "guidance", "--repeats", "2", "--json", str(file)]) == 0
    said, kept = capsys.readouterr().out, json.loads(file.read_text())
    assert [r["name"] for r in kept["races"]] == [line.split("  ")[0] for line in said.splitlines()[1:4]]
    assert [len(r["ratios"]) for r in kept["races"]] == [1, 2, 2] and all(x > 0 for r in kept["races"] for x in r["ratios"])
    assert kept["machine"]["threads"] >= 1


@pytest.mark.parametrize("words, says", [(["flying"], "choose among generation"), (["--repeats", "0"], "--repeats"), (["loss", "--json", "/"], "folder")])
def test_refusals_are_one_line(words, says, capsys):
    try: code = main(["bench", *words])
    except SystemExit as e: code = e.code
    err = capsys.readouterr().err
    assert code == 2 and "Traceback" not in err
    assert says in err


def test_different_work_is_not_compared(monkeypatch):
    import arm.app.bench as benches
    import arm.app.speed as speed
    honest = speed.generate_text
    monkeypatch.setattr(speed, "generate_text", lambda *a, **k: [row[::-1] for row in honest(*a, **k)])
    with pytest.raises(ValueError, match="different work"): generation("tiny", new=8, repeats=1)
    monkeypatch.setattr(benches, "twin", _shifted)
    with pytest.raises(ValueError, match="different work"): training("tiny", n=4, repeats=1)


def _shifted(model):
    other = twin(model)
    with torch.no_grad(): other.model.norm.weight.mul_(1.1)
    return other


def test_turns_alternate_and_the_first_does_not_count():
    order = []
    seconds, last = race({"a": lambda: order.append("a") or len(order), "b": lambda: order.append("b") or len(order)}, 2)
    assert order == list("ababab") and {k: len(v) for k, v in seconds.items()} == dict(a=2, b=2) and last == dict(a=5, b=6)


def test_a_missed_bound_is_printed_and_kept(tmp_path):
    slow = Outcome("x", "y", [.5, .6, .7], 2., True, "equal")
    assert "missed" in bench_table([slow]) and not slow.met
    assert json.loads(save_bench(tmp_path/"b.json", [slow]).read_text())["races"][0]["met"] is False


def test_all_races_have_bounds_and_names():
    out = bench(["encoding"], repeats=1)
    assert len(out) == 1 and out[0].bound == 1.25 and not out[0].least


def test_columns_change_neither_numbers_nor_files(tmp_path):
    rows = sized("tiny")
    for m in rows.modules():
        if isinstance(m, torch.nn.Linear): m.weight.data = m.weight.data.contiguous()
    save_tensors(tmp_path/"rows.safetensors", rows.state_dict())
    before = generate_text(rows, [[1, 2, 3], [4, 5]], max_new=12)
    columns = by_columns(rows)
    assert columns.blocks[0].ffn.down.weight.stride()[0] == 1
    save_tensors(tmp_path/"columns.safetensors", columns.state_dict())
    assert (tmp_path/"rows.safetensors").read_bytes() == (tmp_path/"columns.safetensors").read_bytes()
    assert generate_text(columns, [[1, 2, 3], [4, 5]], max_new=12) == before
    columns.train()(torch.tensor([[1, 2, 3]])).sum().backward() # trains as before
    assert columns.blocks[0].ffn.down.weight.grad.shape == columns.blocks[0].ffn.down.weight.shape


def test_a_rollout_is_raced_against_its_own_pictures_alone(monkeypatch):
    import arm.app.bench as benches
    assert "rollouts" in RACES
    honest = benches.rollout
    def reversed_codes(*args, **kwargs):
        held = honest(*args, **kwargs)
        return replace(held, codes=[c.flip(0) for c in held.codes])
    monkeypatch.setattr(benches, "rollout", reversed_codes)
    with pytest.raises(ValueError, match="different work"): benches.rollouts(samples=2, repeats=1)
