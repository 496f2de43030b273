#!/usr/bin/env python3
"""Compares what TensorBoard reads in run folders with their logs: check_events.py RUN..."""

import json
import pathlib
import struct
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEP = ["loss", "divergence", "cross_entropy", "gradient_norm", "learning_rate"]


def single(value):
    """A number as a float of 32 bits, which is what event files hold."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(run):
    """Tag, then step and value of each point, from the logs."""
    scalars = {}
    add = lambda tag, step, value: scalars.setdefault(tag, []).append((step, single(value)))
    for record in lines(run / "metrics.jsonl"):
        for key, value in record.items():
            if key in STEP:
                add(f"train/{key}", record["step"], value)
            elif key.startswith("validation_") and key != "validation_tokens":
                add(f"validation/{key.removeprefix('validation_')}", record["step"], value)
    for record in lines(run / "timing.jsonl"):
        if record["what"] == "step":
            add("train/tokens_per_second", record["step"], record["tokens_per_second"])
    return scalars


def main():
    for run in map(pathlib.Path, sys.argv[1:]):
        # 0: keep every point; tensorboard would otherwise draw a sample.
        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        wanted = expected(run)
        tags = set(events.Tags()["scalars"])
        if tags != set(wanted) or len(tags) < 5:
            raise SystemExit(f"{run}: tensorboard reads {sorted(tags)}, the logs have {sorted(wanted)}")
        for tag, points in wanted.items():
            read = [(event.step, event.value) for event in events.Scalars(tag)]
            if read != points:
                raise SystemExit(f"{run}: {tag} is {read} for tensorboard, {points} in the logs")
        times = [event.wall_time for event in events.Scalars("train/loss")]
        if times != sorted(times) or times[-1] <= times[0]:
            raise SystemExit(f"{run}: its clock does not go on: {times}")
        count = sum(len(points) for points in wanted.values())
        print(f"{run}: tensorboard reads {count} scalars of {len(wanted)} tags, all as in the logs")


main()
