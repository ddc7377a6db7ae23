"""The algorithms on Omniglot by accuracy, all with the same processor time for meta-training.

    python benchmarks/algorithms.py [--ways 20] [--minutes 15] [--seeds 3] [--jobs 2] [--out table.jsonl] NAME ...

NAMEs are those of VARIANTS. First one core's processor time for an outer step is measured for each of them, --jobs at a
time, then each is trained for as many steps as its minutes hold (in one process, --jobs of these at a time), so that
schedules end where the training does, and judged on 1,000 test tasks at its last step. What others do on the machine
meanwhile changes no result after the measurement. Each line of --out is one measurement or one training; what is there
already is not done again, so that a table may be made in several goes.

Tasks are of one shot and one query example a class; a step has 8 tasks (Reptile's has 5), to have more of them. The
inner rates of 5 ways are those of the packaged configurations; those of 20 ways are of Finn et al. (2017): 0.1 and 5
steps, where a method does not come with its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import distmeta
from distmeta.config import load
from distmeta.distributed.executor import InProcess
from distmeta.distributed.work import shards_of
from distmeta.experiment import assemble

STEPS_5 = ["algorithm.inner_lr=0.1", "algorithm.inner_steps=5", "algorithm.test_inner_steps=5"]
VARIANTS: dict[str, tuple[str, list[str], list[str]]] = {
    # the packaged configuration's last word, changes for any number of ways, and for 20
    "maml": ("maml", [], STEPS_5),
    "maml-0.4": ("maml", [], ["algorithm.inner_lr=0.4", *STEPS_5[1:]]),  # the rate of 5 ways, for 20
    "fomaml": ("maml", ["algorithm.first_order=true"], STEPS_5),
    "anil": ("anil", [], STEPS_5),
    "boil": ("boil", [], STEPS_5[:2]),
    "maml-pp": ("maml-pp", [], STEPS_5[:2]),
    "meta-sgd": ("meta-sgd", [], []),
    "meta-curvature": ("meta-curvature", [], ["algorithm.inner_lr=0.1"]),
    "cavia": ("cavia", [], []),
    "warpgrad": ("warpgrad", [], []),
    "learned-optimizer": ("learned-optimizer", [], []),
    "imaml": ("imaml", [], ["algorithm.cg_damping=20"]),  # with 5 a task's system is not solved at step 155
    "protomaml": ("protomaml", [], []),
    "protonet": ("protonet", [], []),
    "r2d2": ("r2d2", [], []),
    "reptile": ("reptile", [], ["algorithm.inner_lr=0.0005", "algorithm.inner_steps=10", "algorithm.batch_size=20",
                                "algorithm.test_batch_size=10"]),
}  # fmt: skip
COMMON = ["scaling.num_workers=0", "validation.every=0", "evaluation.tasks=1000", "evaluation.baselines=false"]
MEASURED = 20.0  # seconds of the clock


def settings(name: str, ways: int, seed: int) -> tuple[str, list[str]]:
    """A packaged configuration, and what is changed in it."""
    config, always, twenty = VARIANTS[name]
    changes = [*COMMON, f"tasks.ways={ways}", f"seed={seed}", *always, *(twenty if ways == 20 else [])]
    if name != "reptile":
        changes += ["train.meta_batch_size=8", "train.shard_size=8"]
    return f"omniglot-5way-1shot-{config}", changes


def cost(name: str, ways: int) -> float:
    """Processor seconds of an outer step's tasks, the median.

    MAML++ is measured past the annealing of its loss and of its derivatives, which hold for an eighth of the training.
    """
    config = load(*settings(name, ways, 0))
    experiment = assemble(config)
    executor, vector = InProcess(experiment.problem), experiment.problem.layout.pack(experiment.initial)
    seconds: list[float] = []
    end, step = time.perf_counter() + MEASURED, config.train.steps // 2
    while time.perf_counter() < end or len(seconds) < 4:
        start = time.process_time()
        executor.map("meta_gradient", vector, shards_of("train", step, config.train.meta_batch_size, 8))
        seconds.append(time.process_time() - start)
        step += 1
    return statistics.median(seconds[1:])


def one(name: str, ways: int, seed: int, steps: int) -> dict[str, object]:
    """Trains and judges one."""
    config, changes = settings(name, ways, seed)
    changes += [f"train.steps={steps}", "train.log_every=100"]
    if name == "maml-pp":  # as shares of the schedule, those of the packaged configuration
        changes += [f"algorithm.multi_step_until={steps // 8}", f"algorithm.first_order_until={steps // 40}"]
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        run = distmeta.train(config, *changes, f"run_dir={folder}/run")
        test = run.summary()["test"]
        tasks = load(config, changes).train.meta_batch_size * steps
    return {
        "name": name, "ways": ways, "seed": seed, "steps": steps, "tasks": tasks, "test": test,
        "processor_s_with_evaluation": round(time.process_time() - start),
        "peak_MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }  # fmt: skip


def child(call: Sequence[str]) -> dict[str, object]:
    """What a process of its own with one thread answers to ``call``."""
    command = [sys.executable, __file__, "--child", *call]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    costs = {line["name"]: line["cost"] for line in lines if "cost" in line and line["ways"] == arguments.ways}
    had = {(line["name"], line["seed"]) for line in lines if "test" in line and line["ways"] == arguments.ways}
    chosen = arguments.names or [name for name in VARIANTS if arguments.ways == 20 or name != "maml-0.4"]
    names = [name for name in chosen if name not in costs]

    def keep(line: dict[str, object]) -> None:
        with out.open("a") as file:
            print(json.dumps(line), file=file)
        print(json.dumps(line), flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for line in pool.map(child, (["cost", name, str(arguments.ways)] for name in names)):
            keep(line)
            costs[str(line["name"])] = line["cost"]
        wanted = [(name, seed) for seed in range(arguments.seeds) for name in chosen]
        calls = [
            ["one", name, str(arguments.ways), str(seed), str(int(60 * arguments.minutes / costs[name]))]
            for name, seed in wanted
            if (name, seed) not in had
        ]
        for done in [pool.submit(lambda call: keep(child(call)), call) for call in calls]:
            done.result()
    show(out, arguments.ways)


def show(out: Path, ways: int) -> None:
    """The table."""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    costs = {line["name"]: line["cost"] for line in lines if "cost" in line and line["ways"] == ways}
    print(f"\n{'':16} seed  steps   tasks  tasks/s    MiB  accuracy (inductive) in %, {ways}-way 1-shot")
    for line in sorted((x for x in lines if "test" in x and x["ways"] == ways), key=lambda x: (x["name"], x["seed"])):
        rate = line["tasks"] / line["steps"] / costs[line["name"]]
        numbers = f"{line['seed']:4} {line['steps']:6} {line['tasks']:7} {rate:8.1f} {line['peak_MiB']:6}"
        means = [line["test"][key] for key in ("after", "inductive") if key in line["test"]]
        shown = "  ".join(f"{100 * mean['mean']:.2f} ± {100 * mean['ci95']:.2f}" for mean in means)
        print(f"{line['name']:16} {numbers}  {shown}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*VARIANTS, []], metavar="NAME")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=15, help="processor minutes of each training")
    parser.add_argument("--seeds", type=int, default=1, help="how many trainings of each")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, default=Path("algorithms.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        what, name, *numbers = sys.argv[2:]
        parsed = [int(number) for number in numbers]
        made = {"name": name, "ways": parsed[0], "cost": cost(name, *parsed)} if what == "cost" else one(name, *parsed)
        print(json.dumps(made))
    else:
        main(parse())
