"""Which torch each machine gets, from what its commands and device files would say."""

from __future__ import annotations

import subprocess
from urllib.parse import urlsplit

import pytest

from modules.hardware import TORCH_INDEX, HardwareError, Machine, TorchBuild, choose_torch, detect
from tests.conftest import ROOT


class FakeMachine(Machine):
    def __init__(
        self,
        platform: str = "linux",
        arch: str = "x86_64",
        commands: dict[str, str] | None = None,
        pci: list[tuple[str, str]] | None = None,
        files: tuple[str, ...] = (),
    ) -> None:
        super().__init__(platform, arch)
        self._commands = commands or {}
        self._pci = pci or []
        self._files = files

    def run(self, *command: str) -> str | None:
        line = " ".join(command)
        return next((output for start, output in self._commands.items() if line.startswith(start)), None)

    def pci_devices(self) -> list[tuple[str, str]]:
        return self._pci

    def exists(self, path: str) -> bool:
        return path in self._files


def nvidia(line: str, **kwargs: str) -> FakeMachine:
    return FakeMachine(commands={"nvidia-smi": line}, **kwargs)


H200 = nvidia("NVIDIA H200, 580.65.06, 9.0\n")
AMD = FakeMachine(
    pci=[("0x1002", "0x744c")], files=("/dev/kfd",), commands={"rocminfo": "  Marketing Name:  AMD Radeon RX 7900 XTX\n"}
)
ARC = FakeMachine(pci=[("0x8086", "0x56a0")])
MAC = FakeMachine("darwin", "arm64", {"sysctl": "Apple M3 Max\n"})
NONE = FakeMachine(pci=[("0x8086", "0x3e92")])


@pytest.mark.parametrize(
    ("machine", "kind", "build", "index"),
    [
        (H200, "nvidia", "cu130", TORCH_INDEX + "cu130"),
        (nvidia("Tesla T4, 535.104.05, 7.5\n"), "nvidia", "cu126", TORCH_INDEX + "cu126"),
        (nvidia("GeForce GTX 1080, 580.65.06, 6.1\n"), "nvidia", "cu126", TORCH_INDEX + "cu126"),
        (nvidia("NVIDIA RTX 4090, 590.1, 8.9\n", platform="win32", arch="AMD64"), "nvidia", "cu130", TORCH_INDEX + "cu130"),
        (AMD, "amd", "rocm7.2", TORCH_INDEX + "rocm7.2"),
        (FakeMachine(pci=[("0x1002", "0x744c")]), "cpu", "cpu", TORCH_INDEX + "cpu"),  # no compute device: can't run ROCm
        (FakeMachine("win32", "AMD64", {"powershell": "AMD Radeon RX 7800 XT\n"}), "amd", "cpu", None),
        (ARC, "intel", "xpu", TORCH_INDEX + "xpu"),
        (FakeMachine("win32", "AMD64", {"powershell": "Intel(R) UHD Graphics 770\n"}), "cpu", "cpu", None),
        (FakeMachine("win32", "AMD64", {"powershell": "Intel(R) Arc(TM) B580\n"}), "intel", "xpu", TORCH_INDEX + "xpu"),
        (MAC, "apple", "mps", None),
        (FakeMachine("darwin", "x86_64"), "cpu", "cpu", None),
        (NONE, "cpu", "cpu", TORCH_INDEX + "cpu"),
        (FakeMachine("win32", "AMD64"), "cpu", "cpu", None),
    ],
)
def test_each_machine_gets_its_build(machine: FakeMachine, kind: str, build: str, index: str | None) -> None:
    assert detect(machine).kind == kind
    chosen = choose_torch(environ={}, machine=machine)
    assert (chosen.name, chosen.index, chosen.asked) == (build, index, False)


def test_an_old_nvidia_smi_that_knows_no_capability() -> None:
    class Old(FakeMachine):
        def run(self, *command: str) -> str | None:
            return None if "compute_cap" in command[1] else "Tesla K80, 470.1\n"

    found = detect(Old())
    assert (found.kind, found.driver, found.capability) == ("nvidia", "470.1", None)
    assert choose_torch(environ={}, machine=Old()).name == "cu126"


def test_the_flag_wins_over_the_variables_and_they_over_the_hardware() -> None:
    environ = {"SWITCHYARD_TORCH": "xpu", "GPU_CHOICE": "B"}
    assert choose_torch("cpu", environ, H200).name == "cpu"
    assert choose_torch(None, environ, H200).name == "xpu"
    assert choose_torch("auto", {"GPU_CHOICE": "b"}, H200).name == "rocm7.2"
    assert choose_torch(None, {}, H200).name == "cu130"
    assert choose_torch("cpu", {}, H200).asked


@pytest.mark.parametrize(("letter", "build"), [("A", "cu130"), ("B", "rocm7.2"), ("D", "xpu"), ("N", "cpu")])
def test_the_letters_of_text_generation_webui(letter: str, build: str) -> None:
    assert choose_torch(None, {"GPU_CHOICE": letter}, NONE).name == build


def test_choice_a_keeps_the_driver_in_mind() -> None:
    assert choose_torch(None, {"GPU_CHOICE": "A"}, nvidia("Tesla T4, 535.1, 7.5\n")).name == "cu126"


@pytest.mark.parametrize(
    ("flag", "environ"), [("cuda-13", {}), (None, {"GPU_CHOICE": "Z"}), (None, {"SWITCHYARD_TORCH": "../x"}), ("mps", {})]
)
def test_a_choice_that_names_nothing_is_one_line(flag: str | None, environ: dict[str, str]) -> None:
    with pytest.raises(HardwareError) as caught:
        choose_torch(flag, environ, NONE)
    assert "\n" not in str(caught.value)


def test_a_build_knows_its_versions() -> None:
    assert TorchBuild("cpu", TORCH_INDEX + "cpu", "").matches("2.13.0+cpu")
    assert not TorchBuild("cu130", TORCH_INDEX + "cu130", "").matches("2.13.0+cpu")
    assert TorchBuild("mps", None, "").matches("2.13.0")
    assert not TorchBuild("cu130", TORCH_INDEX + "cu130", "").matches("2.13.0")


def test_one_file_names_the_index() -> None:
    host = urlsplit(TORCH_INDEX).netloc
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git checkout")
    names = [
        name
        for name in listed.stdout.splitlines()
        if name.endswith((".py", ".sh", ".bat", ".txt", ".toml")) and host in (ROOT / name).read_text(encoding="utf-8")
    ]
    assert names == ["modules/hardware.py"]
