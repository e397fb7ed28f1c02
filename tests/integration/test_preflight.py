"""`python -m learner.preflight --all-rows`: every broken row is found, and named."""

import json
import subprocess
import sys
from pathlib import Path

from safetensors.numpy import save_file


def test_all_rows_are_read_and_the_broken_ones_told(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "images": None, "answer": 1} for _ in range(12)]
    rows[5]["answer"] = None
    rows[9]["images"] = "nowhere.png"
    rows[9]["prompt"] = "<image>"
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run.yaml").write_text(
        "model: {path: model}\nreward: {functions: [exact_match]}\ntrainer: {total_steps: 1, batch_prompts: 1}\n"
    )
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    save_file({}, tmp_path / "model" / "model.safetensors")
    command = [sys.executable, "-m", "learner.preflight", "run.yaml", f"data.train={tmp_path / 'rows.jsonl'}"]
    all_rows = subprocess.run([*command, "--all-rows"], cwd=tmp_path, capture_output=True, text=True, check=False)
    told = all_rows.stdout.splitlines()
    assert all_rows.returncode == 2
    assert len(told) == 2
    assert "row 5 has no ground truth" in told[0]
    assert "row 9 image 0 is the file" in told[1]
    assert all_rows.stderr.splitlines()[-1] == "12 rows, 2 broken"
    first_row = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (first_row.returncode, first_row.stderr) == (0, "")
    [line] = first_row.stdout.splitlines()
    assert line.startswith("no mistake found: 12 rows, 0 held out (")
    assert line.endswith(" 1 step, rewards exact_match (imported), the files of model.path")
    no_model = subprocess.run([*command, "model.path=nope"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert no_model.returncode == 2
    assert no_model.stderr.startswith("model.path: nope holds no checkpoint")
    by_name = subprocess.run(
        [*command, "model.path=Qwen/Qwen2.5-VL-3B-Instruct"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert by_name.returncode == 2
    assert by_name.stderr.count("\n") == 1
    assert "`hf download Qwen/Qwen2.5-VL-3B-Instruct --local-dir DIRECTORY`" in by_name.stderr
    rows_only = subprocess.run(
        [*command, "--rows-only", "model.path=nope"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (rows_only.returncode, rows_only.stdout, rows_only.stderr) == (0, "", "")
