"""`update` and `rollback`: a new set of environments beside the old one, tried before it is switched to.

Update: pull (only fast forward, only a clean checkout with a remote) -> new set -> smoke test in it -> state.json is replaced
in one step. When anything fails the code goes back to the commit it was at and the old set stays current. The set before
the current one is kept for `rollback`, which takes the code back, too.

Standard library only.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from modules import llamacpp_build
from modules.console import Console
from modules.doctor import NO_MODEL
from modules.environments import Installer, pip_env
from modules.overlays import (
    Overlays,
    env_python,
    env_specs,
    installer_dir,
    read_json,
    site_packages,
    start_script,
    state_path,
    write_json,
)
from modules.pip_output import SetupError
from modules.sets import new_set
from modules.site_packages import installed_packages

SMOKE_TIMEOUT_S = 600


def git(root: Path, *arguments: str) -> str | None:
    """The output of a git command in the checkout, None when it fails or there is no git."""
    path = shutil.which("git")
    if path is None or not (root / ".git").exists():
        return None
    done = subprocess.run([path, *arguments], cwd=root, capture_output=True, text=True, encoding="utf-8", check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def commit(root: Path) -> str | None:
    return git(root, "rev-parse", "HEAD")


def pull(root: Path) -> str:
    """Fetch newer code when that can be done safely; one line that says what happened. Raises SetupError when it should
    have worked."""
    if commit(root) is None:
        return "no git checkout: only the environments are renewed"
    if not git(root, "remote"):
        return "this checkout has no remote: only the environments are renewed"
    if git(root, "status", "--porcelain", "--untracked-files=no"):
        return "this checkout has local changes: the code is left as it is, only the environments are renewed"
    before = commit(root)
    done = subprocess.run(["git", "pull", "--ff-only", "--quiet"], cwd=root, capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        reasons = [line.strip() for line in done.stderr.splitlines() if line.startswith(("fatal:", "error:"))]
        raise SetupError(
            f"git pull --ff-only failed ({reasons[-1] if reasons else 'no reason given'}): check the network, that your "
            "branch has no commits of its own and that no file of yours is in the way."
        )
    after = commit(root)
    return "the code is up to date" if before == after else f"code updated from {str(before)[:9]} to {str(after)[:9]}"


def update(overlays: Overlays, torch: str | None, with_code: bool = True) -> int:
    """Build, try and switch to a new set. The exit status; raises SetupError when nothing was changed."""
    root = overlays.root
    before = read_json(overlays.set_dir / "set.json").get("commit") or commit(root)
    if with_code:
        code_before = commit(root)
        print(f"Switchyard: {pull(root)}.", file=sys.stderr)
        if commit(root) != code_before:
            # The rest must run as the new code has it.
            command = [sys.executable, str(root / "one_click.py"), "update", "--no-pull", *(["--torch", torch] if torch else [])]
            status = subprocess.run(command, cwd=root, check=False).returncode
            if status != 0 and code_before and git(root, "reset", "--keep", code_before) is not None:
                print(f"Switchyard: the code is back at {code_before[:9]}.", file=sys.stderr)
            return status
    new = _begin(overlays)
    try:
        _build(overlays, new, torch)
        _smoke(new)
    except SetupError as error:
        raise SetupError(f"The update was not made, the old environments stay: {error}") from error
    _switch(root, overlays, new, before)
    print(f"Switchyard: updated. {start_script()} rollback goes back.", file=sys.stderr)
    return 0


def _begin(overlays: Overlays) -> Overlays:
    """The set to build: one that an earlier update left half made, else a new one."""
    state = read_json(state_path(overlays.root))
    path = installer_dir(overlays.root) / "sets" / str(state.get("building") or "none")
    if not read_json(path / "set.json"):
        path = new_set(overlays.root)
        write_json(state_path(overlays.root), {**state, "building": path.name})
    record = read_json(path / "set.json")
    choice = read_json(overlays.set_dir / "set.json").get("torch")
    write_json(path / "set.json", {**record, "commit": commit(overlays.root), **({"torch": choice} if choice else {})})
    return Overlays(path, overlays.root)


def _build(old: Overlays, new: Overlays, torch: str | None) -> None:
    """Every environment the old set has, made from today's requirements."""
    names = [name for name in env_specs(new.root) if name in ("parent", "llamacpp") or old.marker(name)]
    build = old.marker("llamacpp").get("llama_cpp") == "ok"
    console = Console(len(names) + 1 + build)
    installer = Installer(new, console.progress, torch=torch)
    for name in names:
        console.phase(installer.specs[name].title)
        installer.ensure(name)
    if build:
        console.phase(llamacpp_build.TITLE)
        state = llamacpp_build.ensure(installer)
        console.finish("done" if state == "ok" else f"left out: {state}")
    console.phase("Trying the new environments")
    console.finish("started")


def _smoke(new: Overlays) -> None:
    """Raises SetupError unless every backend installed in the new set works there."""
    env = {**pip_env(), "SWITCHYARD_SET": str(new.set_dir)}
    command = [str(env_python(new.env_dir("parent"))), str(new.root / "server.py"), "doctor", "--json"]
    try:
        done = subprocess.run(
            command, cwd=new.root, env=env, capture_output=True, encoding="utf-8", timeout=SMOKE_TIMEOUT_S, check=False
        )
        report = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise SetupError("the test of the new environments did not end") from error
    except ValueError as error:
        raise SetupError(f"the new environments do not start: {_last_line(done.stderr)}") from error
    tried = [row for row in report["loaders"] if row["installed"] and row["device_ok"] and not row["fix"].startswith(NO_MODEL)]
    failed = [row for row in tried if not row["smoke_ok"]]
    if failed:
        raise SetupError(f"{failed[0]['name']} fails its test in the new environments: {failed[0]['fix']}")


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")


def _switch(root: Path, old: Overlays, new: Overlays, old_commit: str | None) -> None:
    record = read_json(old.set_dir / "set.json")
    if old_commit and record:
        write_json(old.set_dir / "set.json", {**record, "commit": old_commit})
    write_json(state_path(root), {"current": new.set_dir.name, "previous": old.set_dir.name})
    for path in (installer_dir(root) / "sets").iterdir():
        if path.is_dir() and path.name not in (new.set_dir.name, old.set_dir.name):
            shutil.rmtree(path, ignore_errors=True)  # a file in use on Windows goes with the next update


def rollback(root: Path) -> int:
    """Make the previous set current, and its code where the checkout allows."""
    state = read_json(state_path(root))
    previous = state.get("previous")
    path = installer_dir(root) / "sets" / str(previous)
    record = read_json(path / "set.json")
    if not previous or not record:
        raise SetupError("There is no earlier set of environments to go back to.")
    wanted, now = record.get("commit"), commit(root)
    if wanted and now and wanted != now:
        if git(root, "status", "--porcelain", "--untracked-files=no"):
            raise SetupError("This checkout has local changes: commit or stash them, then roll back.")
        if git(root, "reset", "--keep", str(wanted)) is None:
            raise SetupError(f"git can't go back to {str(wanted)[:9]}; the environments were left as they are.")
        print(f"Switchyard: the code is back at {str(wanted)[:9]}.", file=sys.stderr)
    write_json(state_path(root), {"current": previous, "previous": state.get("current")})
    print(f"Switchyard: back to the environments of {record.get('made', previous)}.", file=sys.stderr)
    return 0


# --- locks -----------------------------------------------------------------------------------------------------


def write_locks(overlays: Overlays) -> int:
    """Developers': write what each environment holds into loaders/requirements/locks, which later set-ups are held to."""
    folder = overlays.root / "loaders" / "requirements" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    for name in env_specs(overlays.root):
        site = site_packages(overlays.env_dir(name))
        if site is None:
            continue
        packages = installed_packages(site)
        lines = [f"{package}=={version}" for package, version in packages.items() if not _unlocked(package)]
        head = f"# Made by one_click.py lock with Python {sys.version_info[0]}.{sys.version_info[1]}; not to be edited."
        (folder / f"{name}.txt").write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    return 0


def _unlocked(package: str) -> bool:
    """What differs by machine (torch and what its builds bring) or is compiled here."""
    return bool(
        re.match(r"(torch|triton|nvidia-|pytorch-triton|intel-|llama-cpp-python|llama_cpp|pip$|setuptools$|wheel$)", package)
    )
