"""The llama-cpp-python build: which compiler, in which order, and that only a wheel that passed its test is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from modules import llamacpp_build as build
from modules.environments import Installer
from modules.llamacpp_build import KEEP_STORES, NO_AMX, Attempt, Compiler, attempts, cpu_has_amx, death, find_compiler
from modules.overlays import MARKER, Overlays, env_python, read_json, write_json
from tests.unit.test_hardware import FakeMachine

GCC_12 = "c++ (Debian 12.2.0-14) 12.2.0\nCopyright (C) 2022 Free Software Foundation, Inc.\n"
CLANG = "Apple clang version 17.0.0 (clang-1700.0.13.3)\n"


def which(*names: str) -> Callable[[str], str | None]:
    return lambda name: f"/usr/bin/{name}" if name in names else None


@pytest.fixture(autouse=True)
def _no_cxx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("SWITCHYARD_SMOKE_GGUF", raising=False)


def test_compilers() -> None:
    assert find_compiler(FakeMachine(commands={"/usr/bin/c++": GCC_12}), which("c++")) == Compiler("/usr/bin/c++", (12, 2))
    clang = FakeMachine("darwin", "arm64", {"/usr/bin/clang++": CLANG})
    assert find_compiler(clang, which("c++", "clang++")) == Compiler(
        "/usr/bin/clang++", None
    )  # its c++ only asks to be installed
    assert find_compiler(FakeMachine(), which()) is None
    studio = FakeMachine("win32", "AMD64", {r"C:\Program Files (x86)": "C:\\VS\\2022\n"})
    found = find_compiler(studio, which())
    assert found is not None or sys.platform != "win32"


def test_the_build_that_must_crash_is_left_out() -> None:
    assert [a.flags for a in attempts(Compiler("c++", (12, 2)), amx=True)] == [KEEP_STORES, NO_AMX]
    for compiler, amx in ((Compiler("c++", (12, 2)), False), (Compiler("c++", (13, 2)), True), (Compiler("clang++"), True)):
        assert [a.flags for a in attempts(compiler, amx)] == ["", KEEP_STORES, NO_AMX]


def test_cuda_goes_first_where_a_card_and_its_compiler_are(monkeypatch: pytest.MonkeyPatch) -> None:
    order = attempts(Compiler("c++", (13, 3)), amx=True, cuda=True)
    assert [(a.cuda, a.flags) for a in order] == [(True, ""), (False, ""), (False, KEEP_STORES), (False, NO_AMX)]
    assert attempts(Compiler("c++", (12, 2)), amx=True, cuda=True)[0] == Attempt("with CUDA", KEEP_STORES, cuda=True)
    assert "-DGGML_CUDA=ON" in build.cmake_args("", cuda=True)
    assert build.cmake_args("-DX=1", cuda=False) == "-DGGML_NATIVE=ON -DX=1"
    monkeypatch.setattr(build.shutil, "which", lambda name: "/usr/bin/nvcc")
    for present in (True, False):  # a toolkit without a card does not configure
        monkeypatch.setattr(build, "nvidia_present", lambda present=present: present)
        assert build.cuda_ready() is present


def test_a_compile_error_is_told_in_the_compilers_words() -> None:
    cmake = [
        "-- Configuring done",
        "CMake Error in ggml/CMakeLists.txt:",
        '  CUDA_ARCHITECTURES is "native"',
        "ERROR: Failed building",
    ]
    assert build.compile_error(cmake).endswith('CMake Error in ggml/CMakeLists.txt: CUDA_ARCHITECTURES is "native"')
    assert "unknown type" in build.compile_error(["a.cpp:3:1: error: unknown type name 'x'", "ERROR: Failed building"])
    assert "disk is full" in build.compile_error(["cc1plus: No space left on device"])


def test_amx_is_read_from_cpuinfo(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text("processor: 0\nflags\t\t: fpu avx512f amx_bf16 avx512_fp16 amx_tile amx_int8\n", encoding="utf-8")
    assert cpu_has_amx(path)
    path.write_text("flags\t\t: fpu avx2\nbugs: amx_tile\n", encoding="utf-8")
    assert not cpu_has_amx(path)
    assert not cpu_has_amx(tmp_path / "absent")


def test_a_death_is_one_line() -> None:
    assert death(-11, []) == "it died with SIGSEGV"
    assert death(1, ["Traceback", "  x", "ImportError: libgomp.so.1", ""]) == "exit status 1: ImportError: libgomp.so.1"


def test_build_jobs_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.os, "cpu_count", lambda: 64)
    if hasattr(build.os, "sysconf"):
        monkeypatch.setattr(build.os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 8 * 2**30 // 4096}[name])
        assert build.build_jobs() == 5


class FakeRunner:
    """Plays pip and the test child. `verdicts` are the exit statuses of the successive test runs."""

    def __init__(self, verdicts: list[int], compiles: bool = True, cached: bool = False) -> None:
        self.verdicts = verdicts
        self.compiles = compiles
        self.cached = cached
        self.cuda_fails = False
        self.built: list[dict[str, str]] = []
        self.commands: list[list[str]] = []

    def run(
        self, command: Sequence[str | Path], on_line: Callable[[str], None], env: dict[str, str], cwd: Path | None = None
    ) -> tuple[int, list[str]]:
        words = [str(word) for word in command]
        self.commands.append(words)
        if "wheel" in words:
            self.built.append(env)
            if not self.compiles or (self.cuda_fails and "CUDA" in env["CMAKE_ARGS"]):
                return 1, ["ERROR: Failed building wheel for llama-cpp-python"]
            if not self.cached:
                on_line("  [3/6] Building CXX object ggml.cpp.o")
            self.cached = False
            folder = Path(words[words.index("--wheel-dir") + 1])
            folder.mkdir(parents=True)
            (folder / f"llama_cpp_python-{build.VERSION}-py3-none-any.whl").write_text(str(len(self.built)), encoding="utf-8")
        elif "modules.llamacpp_smoke" in words:
            return self.verdicts.pop(0), []
        return 0, []

    @property
    def installed(self) -> list[str]:
        wheels = [c[-1] for c in self.commands if "install" in c and "--target" not in c]
        return [Path(wheel).read_text(encoding="utf-8") for wheel in wheels]


class Bench:
    """An installer whose llamacpp environment is complete and whose commands are played."""

    def __init__(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, verdicts: list[int], compiles: bool = True, cached: bool = False
    ) -> None:
        self.lines: list[str] = []
        self.runner = FakeRunner(verdicts, compiles, cached)
        overlays = Overlays(root / "set", root)
        python = env_python(overlays.env_dir("llamacpp"))
        python.parent.mkdir(parents=True, exist_ok=True)
        if not python.exists():
            python.symlink_to(sys.executable)
        if not overlays.marker("llamacpp"):
            write_json(overlays.env_dir("llamacpp") / MARKER, {"packages": {}})
        (root / "models").mkdir(exist_ok=True)
        (root / "models" / "wren.gguf").write_bytes(b"GGUF")
        self.installer = Installer(overlays, lambda stage, fraction, line: self.lines.append(line))
        self.installer.runner = self.runner  # type: ignore[assignment]
        monkeypatch.setattr(self.installer, "ensure", lambda env: False)
        monkeypatch.setattr(build._Build, "_cached_wheels", lambda self: False)

    def marker(self) -> dict[str, object]:
        return read_json(self.installer.overlays.env_dir("llamacpp") / MARKER)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: Compiler("/usr/bin/c++", (12, 2)))
    monkeypatch.setattr(build, "cpu_has_amx", lambda: False)
    monkeypatch.setattr(build, "cuda_ready", lambda: False)


@pytest.mark.usefixtures("compiler")
def test_a_good_build_is_installed_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, [0])
    assert build.ensure(bench.installer) == "ok"
    assert bench.marker()["llama_cpp"] == "ok"
    assert bench.runner.installed == ["1"]
    assert "GGML_NATIVE=ON" in bench.runner.built[0]["CMAKE_ARGS"]
    assert any("compiling 3 of 6" in line for line in bench.lines)
    assert build.ensure(bench.installer) == "ok"
    assert len(bench.runner.built) == 1
    # Another set takes the wheel that passed here, after trying it again.
    (bench.installer.overlays.env_dir("llamacpp") / MARKER).unlink()
    second = Bench(tmp_path, monkeypatch, [0])
    assert build.ensure(second.installer) == "ok"
    assert second.runner.built == []
    assert second.runner.installed == ["1"]


@pytest.mark.usefixtures("compiler")
def test_a_build_that_dies_is_made_again_without_the_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, [-11, 0])
    (tmp_path / "set" / "llamacpp" / "llama-build-killed").mkdir()
    assert build.ensure(bench.installer) == "ok"
    assert not list((tmp_path / "set" / "llamacpp").glob("llama-*"))
    assert [env["CXXFLAGS"] for env in bench.runner.built] == ["", KEEP_STORES]
    assert bench.runner.installed == ["2"]
    assert any("SIGSEGV" in line for line in bench.lines)


@pytest.mark.usefixtures("compiler")
def test_a_wheel_of_pips_cache_that_dies_is_compiled_here_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, [-4, -11, 0], cached=True)
    forgotten: list[int] = []
    monkeypatch.setattr(build._Build, "_forget_cached_wheels", lambda self: forgotten.append(len(bench.runner.built)))
    assert build.ensure(bench.installer) == "ok"
    assert [env["CXXFLAGS"] for env in bench.runner.built] == ["", "", KEEP_STORES]
    assert forgotten == [1, 2]  # never before the first try: a good one is kept


@pytest.mark.usefixtures("compiler")
def test_the_last_resort_is_no_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, [-11, -4, 0])
    assert build.ensure(bench.installer) == "ok"
    assert NO_AMX in bench.runner.built[2]["CXXFLAGS"]


@pytest.mark.usefixtures("compiler")
def test_nothing_that_failed_its_test_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, [-11, -11, -11])
    state = build.ensure(bench.installer)
    assert "SIGSEGV" in state
    assert "\n" not in state
    assert bench.runner.installed == []
    assert bench.marker()["llama_cpp"] == state
    assert build.ensure(bench.installer) == state  # not again with the same compiler
    assert len(bench.runner.built) == 3
    monkeypatch.setattr(build, "find_compiler", lambda: Compiler("/usr/bin/c++", (14, 1)))
    assert build.build_state(bench.installer) == ""  # but with another


@pytest.mark.usefixtures("compiler")
def test_a_build_that_fails_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, monkeypatch, [], compiles=False)
    assert "Failed building wheel" in build.ensure(bench.installer)
    assert bench.runner.installed == []


@pytest.mark.usefixtures("compiler")
def test_cuda_that_does_not_compile_leaves_the_processors_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "cuda_ready", lambda: True)
    bench = Bench(tmp_path, monkeypatch, [0])
    bench.runner.cuda_fails = True
    assert build.ensure(bench.installer) == "ok"
    assert ["CUDA" in env["CMAKE_ARGS"] for env in bench.runner.built] == [True, False]
    assert bench.runner.installed == ["2"]


@pytest.mark.usefixtures("compiler")
def test_a_kept_wheel_that_dies_here_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.ensure(Bench(tmp_path, monkeypatch, [0]).installer)
    (tmp_path / "set" / "llamacpp" / MARKER).unlink()
    bench = Bench(tmp_path, monkeypatch, [-4, 0])
    assert build.ensure(bench.installer) == "ok"
    assert len(bench.runner.built) == 1


@pytest.mark.usefixtures("compiler")
def test_a_kept_wheel_of_another_machine_or_content_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.ensure(Bench(tmp_path, monkeypatch, [0]).installer)
    (tmp_path / "set" / "llamacpp" / MARKER).unlink()
    next((tmp_path / "installer_files" / "wheels").glob("*.whl")).write_text("changed", encoding="utf-8")
    bench = Bench(tmp_path, monkeypatch, [0])
    assert build.ensure(bench.installer) == "ok"
    assert len(bench.runner.built) == 1


def test_without_a_compiler_it_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    bench = Bench(tmp_path, monkeypatch, [])
    state = build.ensure(bench.installer)
    assert "no C++ compiler; xllamacpp runs" in state
    assert "\n" not in state
    assert bench.runner.commands == []


def test_the_smoke_model_is_the_smallest_bundled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.smoke_model(tmp_path) is None
    (tmp_path / "models" / "wren-6m-gguf").mkdir(parents=True)
    (tmp_path / "models" / "tiny.gguf").write_bytes(b"1")
    (tmp_path / "models" / "wren-6m-gguf" / "wren-Q8_0.gguf").write_bytes(b"12")
    (tmp_path / "models" / "wren-6m-gguf" / "wren-F16.gguf").write_bytes(b"1234")
    found = build.smoke_model(tmp_path)
    assert found is not None
    assert found.name == "wren-Q8_0.gguf"
    monkeypatch.setenv("SWITCHYARD_SMOKE_GGUF", str(tmp_path / "models" / "tiny.gguf"))
    assert build.smoke_model(tmp_path) == tmp_path / "models" / "tiny.gguf"


def test_an_attempt_has_a_name_for_the_page() -> None:
    assert Attempt("native").name
    assert len({a.name for a in attempts(Compiler("c++"), False)}) == 3
