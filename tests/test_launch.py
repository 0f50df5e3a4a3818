"""The files for a cluster, started for real: four stages on two processes, one of them killed, and the run that goes on."""
import os
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch
from arm.app import launch
from arm.core import load_json
from arm.data.openmoji import DATA
from arm.data.text import default_tokenizer
from arm.model.export import export_hub
from arm.model.hub import Growth, load_hub
from arm.model.tasks import Arm
from arm.train.strategies import read_curve
from tools.repo import ROOT

FILES, CONFIGS = ROOT/"data"/"launch", {s: str(ROOT/"data"/"launch"/f"{s}.yaml") for s in launch.TITLES}
SMALL = "--checkpointing true --bf16 false --every 2 --painter".split() + [str(DATA/"models"/"tiny")]
PACKED = [*SMALL, *"--workers 0 --data shapes --rows 4 --row 128 --groups 2 --lr 0.003".split()]
HOW = {  # stage: start, and how it is spread and cut down
    "pt": ("qwen", [*PACKED, *"--kind fsdp2 --steps 3".split()]),
    "ct": ("pt/model", [*PACKED, *"--kind tp --tp 2 --steps 2".split()]),
    "sft": ("ct/model", [*PACKED, *"--kind ddp --accumulate 2 --steps 2".split()]),
    "rl": ("shipped", [*SMALL, *"--kind fsdp2 --accumulate 1 --steps 2 --prompts shapes --n_prompts 4 --num_generations 4 --side 6 --part_rows 8 --lr 0.0001".split()]),
}
LONG = 40  # steps of the run that is killed


def words(stage: str, top: Path, gpus: int, **change) -> list[str]:
    "What is typed behind the stage's file."
    start, how = HOW[stage]
    last = [x for k, v in change.items() for x in (f"--{k}", str(v))]
    return ["--base", str(top/start), "--out", str(top/stage), "--gpus", str(gpus), *how, *last]


def all_stages(out: Path):
    "What each of two processes runs: the command of every stage, and the exit of the last one."
    from arm.train import place
    torch.set_num_threads(1)
    real, place.leave = place.leave, lambda code, launched: code and os._exit(code)
    for stage in HOW:
        if stage == "rl": place.leave = real
        launch.main([stage, "--config", CONFIGS[stage], *words(stage, out, 2)])


def port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return s.getsockname()[1]


def environment(**more) -> dict:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PATH": path, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT/"tests")]), **{k: str(v) for k, v in more.items()}}


@cache
def starts(out: Path):
    "A published text model in small, and the shipped model as a stage leaves it."
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
    Qwen2ForCausalLM(Qwen2Config(vocab_size=default_tokenizer().vocab_size, tie_word_embeddings=False, **sizes)).save_pretrained(out/"qwen")
    default_tokenizer().save(out/"qwen"/"tokenizer.json")
    arm = Arm.from_pretrained(DATA/"models"/"tiny")
    export_hub(arm.model, out/"shipped", text=arm.text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("launch")
    starts(out)
    return out


@pytest.fixture(scope="module")
def trained(folder):
    done = subprocess.run(["torchrun", "--standalone", "--nproc-per-node", "2", __file__, str(folder)], cwd=ROOT, env=environment(), capture_output=True, text=True)
    return folder, done


def test_four_stages_run_under_torchrun_and_leave_cleanly(trained):
    out, done = trained
    assert done.returncode == 0, done.stderr[-3000:]
    assert "terminate called" not in done.stderr and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.stdout.count("done: ") == len(HOW)  # the first process says it, the other does not


@pytest.mark.parametrize("stage", HOW)
def test_a_stage_moves_its_weights_and_leaves_a_model(stage, trained):
    out, done = trained
    before, after = (out/HOW[stage][0], out/stage/"model")
    end, start = load_hub(after), load_hub(before, Growth(visual_groups=2) if stage == "pt" else None)  # a folder that a stage has left knows what was added
    assert max(float((a - b).abs().max()) for a, b in zip(start.parameters(), end.parameters())) > 1e-5
    assert all(p.isfinite().all() for p in end.parameters()) and (after/"tokenizer.json").exists()
    steps = int(HOW[stage][1][HOW[stage][1].index("--steps") + 1])
    assert len(read_curve(out/stage)) == steps == load_json(out/stage/"last.json")["step"]


def test_pre_training_gives_the_curve_of_one_process(trained, tmp_path):
    out, _ = trained
    assert launch.main(["pt", "--config", CONFIGS["pt"], *words("pt", out, 1, kind="single", out=tmp_path/"one")]) == 0
    one, two = read_curve(tmp_path/"one"), read_curve(out/"pt")
    assert len(one) == len(two) == 3 and max(abs(a - b) for a, b in zip(one, two)) < 1e-5


def child(parent: int, rank: int) -> int | None:
    "The process that a launcher has started with this number."
    for p in Path("/proc").iterdir():
        try:
            if f"PPid:\t{parent}\n" in (p/"status").read_text() and f"RANK={rank}".encode() in (p/"environ").read_bytes().split(b"\0"): return int(p.name)
        except (OSError, ValueError): pass


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill in /proc")
def test_a_killed_process_ends_the_job_and_the_next_one_goes_on(folder, tmp_path):
    out, run = folder, tmp_path/"killed"
    typed = words("pt", out, 2, steps=LONG, out=run)
    job = subprocess.Popen(["bash", str(FILES/"pt.sh"), *typed], cwd=ROOT, env=environment(NODES=1, GPUS=2, HEAD="localhost", PORT=port(), RESTARTS=0), stderr=subprocess.PIPE, text=True)
    until = time.time() + 600
    while not (run/"last.json").exists():
        assert time.time() < until and job.poll() is None, job.stderr.read()[-3000:]
        time.sleep(.02)
    agent = next(int(p) for p in subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split())
    os.kill(child(agent, 1), signal.SIGKILL)
    said = job.communicate(timeout=300)[1]
    step = load_json(run/"last.json")["step"]
    lines = [line for line in said.splitlines() if line.startswith("arm: ")]
    assert job.returncode != 0 and step < LONG
    assert len(lines) == 1 and "process 0 of 2 " in lines[0] and f"goes on from step {step}" in lines[0], said[-3000:]
    assert "SIGKILL" in said  # torchrun names who died
    stub = tmp_path/"bin"/"srun"  # goes on under SLURM's variables, on one process
    stub.parent.mkdir()
    slurm = dict(SLURM_JOB_ID=1, SLURM_JOB_NAME="arm-pt", SLURM_NTASKS=1, SLURM_NTASKS_PER_NODE=1, SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_NODEID=0, SLURM_NNODES=1, SLURM_NODELIST="localhost")
    stub.write_text("#!/bin/bash\nshift\n" + "".join(f"export {k}={v}\n" for k, v in slurm.items()) + 'exec "$@"\n')
    stub.chmod(0o755)
    env = environment(MASTER_PORT=port())
    done = subprocess.run(["bash", str(FILES/"pt.sbatch"), *words("pt", out, 1, steps=LONG, out=run)], cwd=ROOT, env={**env, "PATH": f"{stub.parent}{os.pathsep}{env['PATH']}"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert launch.main(["pt", "--config", CONFIGS["pt"], *words("pt", out, 1, steps=LONG, kind="single", out=tmp_path/"whole")]) == 0
    resumed, whole = read_curve(run), read_curve(tmp_path/"whole")
    assert len(resumed) == len(whole) == LONG and max(abs(a - b) for a, b in zip(resumed, whole)) < 1e-5 * 3  # forty steps carry rounding further than three
    assert (run/"model"/"config.json").exists()


@pytest.mark.parametrize("stage", launch.TITLES)
def test_the_files_are_the_ones_that_the_command_writes(stage, tmp_path):
    launch.write_files(tmp_path)
    for end in ("yaml", "sbatch", "sh"):
        assert (FILES/f"{stage}.{end}").read_text() == (tmp_path/f"{stage}.{end}").read_text(), "write them anew: python -m arm.app.launch files"
        if end == "yaml": continue
        subprocess.run(["bash", "-n", str(FILES/f"{stage}.{end}")], check=True)
        assert os.access(FILES/f"{stage}.{end}", os.X_OK)


@pytest.mark.parametrize("typed", [["--help"], ["sft", "--help"]])
def test_help_is_no_failure(typed, capsys):
    assert launch.main(typed) == 0
    assert "stopped" not in capsys.readouterr().err


@pytest.mark.parametrize("stage", launch.TITLES)
def test_both_launchers_start_the_same_command_on_the_papers_gpus(stage, tmp_path):
    for name in ("srun", "torchrun"):
        stub = tmp_path/name
        stub.write_text(f'#!/bin/bash\necho "$0 $@" >> {tmp_path}/said\n')
        stub.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "HEAD": "node01"}
    for end in ("sbatch", "sh"): subprocess.run(["bash", str(FILES/f"{stage}.{end}"), "--dry_run"], cwd=ROOT, env=env, check=True)
    said = [line.split("-m arm.app.launch ") for line in (tmp_path/"said").read_text().splitlines()]
    n = len(said)//2
    assert n == (3 if stage == "rl" else 1) and [s[1] for s in said[:n]] == [s[1] for s in said[n:]]
    assert all(s[1].startswith(f"{stage} --config data/launch/{stage}.yaml") and s[1].endswith("--dry_run") for s in said)
    gpus = {"pt": 200, "ct": 160, "sft": 80, "rl": 80}[stage]
    assert f"--nnodes {gpus//8} --nproc-per-node 8" in said[n][0] and f"#SBATCH --nodes={gpus//8}\n" in (FILES/f"{stage}.sbatch").read_text()


@pytest.mark.parametrize("stage", launch.TITLES)
def test_a_dry_run_prints_the_plan_of_the_papers_numbers(stage, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the files name folders such as runs/sft/model; what lies there must not matter
    assert launch.main([stage, "--config", CONFIGS[stage], "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "fits       yes" in said and {"pt": "762,939 of 3,276,800 tokens", "ct": "476,837 of", "sft": "76 of", "rl": "280 updates of 640 pictures"}[stage] in said


def test_what_cannot_work_is_refused_in_one_line(tmp_path, capsys):
    for typed in (["pt", "--config", CONFIGS["pt"]], ["rl", "--phase", "both"], ["pt", "--steps", "many"], ["fly"], ["sft", "--config", str(tmp_path/"none.yaml")]):
        assert launch.main([*typed, *(["--out", str(tmp_path/"x")] if typed != ["fly"] else [])]) == 2
        said = capsys.readouterr().err
        assert said.startswith("arm: ") and said.count("\n") == 1, said
    assert not (tmp_path/"x").exists()


if __name__ == "__main__": all_stages(Path(sys.argv[1]))
