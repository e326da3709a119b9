"""What rows say of the commit that they were measured at."""

import subprocess

from harness.commits import commit_of


def test_a_checkout_says_its_commit_and_whether_it_was_changed(tmp_path):
    assert commit_of(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=A", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    assert commit_of(tmp_path) is None
    (tmp_path / "results").mkdir()
    code, rows, text = tmp_path / "code.py", tmp_path / "results" / "rows.csv", tmp_path / "results" / "README.md"
    for path in (code, rows, text):
        path.write_text("before")
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "Begin"], check=True)
    at = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert commit_of(tmp_path, but=[tmp_path / "results"]) == at

    rows.write_text("after")
    assert commit_of(tmp_path, but=[tmp_path / "results"]) == at
    assert commit_of(tmp_path) == f"{at}-dirty"
    rows.write_text("before")
    text.write_text("after")
    assert commit_of(tmp_path, but=[tmp_path / "*.md"]) == at
    code.write_text("after")
    assert commit_of(tmp_path, but=[tmp_path / "results"]) == f"{at}-dirty"
