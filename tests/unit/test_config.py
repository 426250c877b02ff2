"""The configuration table: precedence, CMD_FLAGS.txt, foreign flags, refusals, the sample file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from modules.command_line import COMMANDS, normalise, parse, parse_cmd_flags, split_command
from modules.config import Config, loader_option_rows, server_options
from modules.errors import ConfigError
from modules.foreign_flags import FOREIGN_FLAGS
from modules.options import sample_file
from modules.registry import discover
from tests.conftest import ROOT


def read(tmp_path: Path, *argv: str, **environ: str) -> Config:
    return parse(["--user-data-dir", str(tmp_path), *argv], environ, root=tmp_path)


def test_defaults(tmp_path: Path) -> None:
    config = read(tmp_path)
    assert (config.host, config.listen_port, config.command) == ("127.0.0.1", 7860, "serve")
    assert config.url == "http://127.0.0.1:7860"
    assert config.model_dirs == (ROOT / "models",)


def test_command_line_over_environment_over_file_over_default(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("listen_port: 1111\nidle-timeout: 5\nextensions: [one, two]\n", encoding="utf-8")
    assert read(tmp_path).listen_port == 1111
    assert read(tmp_path, SWITCHYARD_LISTEN_PORT="2222").listen_port == 2222
    config = read(tmp_path, "--listen-port", "3333", SWITCHYARD_LISTEN_PORT="2222")
    assert (config.listen_port, config.idle_timeout, config.extensions) == (3333, 5.0, ("one", "two"))
    assert {"listen_port", "idle_timeout", "extensions"} <= config.explicit


def test_the_environment_gives_every_kind(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        SWITCHYARD_VERBOSE="yes",
        SWITCHYARD_IDLE_TIMEOUT="2.5",
        SWITCHYARD_EXTENSIONS="a,b",
        SWITCHYARD_MODEL_DIR="/models",
        SWITCHYARD_BACKGROUND_INSTALL="off",
    )
    assert (config.verbose, config.idle_timeout, config.extensions) == (True, 2.5, ("a", "b"))
    assert config.model_dir == Path("/models")
    assert not config.background_install


@pytest.mark.parametrize(
    "environ", [{"SWITCHYARD_LISTEN_PORT": "http"}, {"SWITCHYARD_VERBOSE": "perhaps"}, {"SWITCHYARD_IDLE_TIMEOUT": "soon"}]
)
def test_a_bad_value_names_its_variable(tmp_path: Path, environ: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=next(iter(environ))):
        read(tmp_path, **environ)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("listen_prt: 1", "Did you mean 'listen_port'"),
        ("- a\n- b", "must be a map"),
        ("a: [", "no YAML"),
        ("listen_port: x", "listen_port"),
    ],
)
def test_a_bad_settings_file_is_one_line(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "my settings.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=says) as caught:
        read(tmp_path, "--settings", str(path))
    assert "\n" not in str(caught.value)


def test_a_settings_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"can't be read"):
        read(tmp_path, "--settings", str(tmp_path / "absent.yaml"))


def test_cmd_flags_come_first_so_that_the_command_line_wins(tmp_path: Path) -> None:
    text = '# a comment\n--listen-port 5000 \\\n--model "my model"  # and this\n\n#--verbose\n'
    (tmp_path / "CMD_FLAGS.txt").write_text(text, encoding="utf-8")
    assert read(tmp_path).listen_port == 5000
    config = read(tmp_path, "--listen-port", "6000")
    assert (config.listen_port, config.model, config.verbose) == (6000, "my model", False)


def test_cmd_flags_in_the_data_folder_win_over_those_in_the_root(tmp_path: Path) -> None:
    (tmp_path / "CMD_FLAGS.txt").write_text("--listen-port 1", encoding="utf-8")
    (tmp_path / "user_data").mkdir()
    (tmp_path / "user_data" / "CMD_FLAGS.txt").write_text("--listen-port 2", encoding="utf-8")
    assert parse([], {}, root=tmp_path).listen_port == 2


def test_cmd_flags_with_an_open_quote() -> None:
    with pytest.raises(ConfigError, match="CMD_FLAGS"):
        parse_cmd_flags('--model "half')


def test_both_spellings(tmp_path: Path) -> None:
    assert read(tmp_path, "--listen_port=9000").listen_port == 9000
    assert normalise(["--n_ctx=4_096", "a_b", "--model", "x_y"]) == ["--n-ctx=4_096", "a_b", "--model", "x_y"]


def test_a_subcommand_may_follow_flags_but_is_no_value(tmp_path: Path) -> None:
    config = read(tmp_path, "--listen-port", "8000", "doctor", "--json")
    assert (config.command, config.listen_port) == ("doctor", 8000)
    assert config.arguments is not None
    assert config.arguments.json
    assert split_command(["--model", "doctor"])[0] == "serve"
    assert split_command(["--verbose", "doctor"])[0] == "doctor"
    assert read(tmp_path, "doctor", "--model-dir", "/elsewhere").model_dir == Path("/elsewhere")


def test_an_unknown_flag_is_refused_with_a_guess(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean --listen-port"):
        read(tmp_path, "--listen-prt", "1")
    with pytest.raises(ConfigError, match="Unknown subcommand 'dcotor'"):
        read(tmp_path, "dcotor")


@pytest.mark.parametrize("flag", sorted(FOREIGN_FLAGS))
def test_every_flag_of_text_generation_webui_warns_and_goes_on(tmp_path: Path, flag: str) -> None:
    values = ["5"] * FOREIGN_FLAGS[flag].takes_values
    config = read(tmp_path, flag.replace("-", "_").replace("__", "--"), *values, "--listen-port", "4000")
    assert config.listen_port == 4000
    known = {name for row in (*server_options(), *loader_option_rows()) for name in row.flags()}
    if flag not in known:
        assert len(config.warnings) == 1
        assert "\n" not in config.warnings[0]


# What text-generation-webui 4.7 and 1.1 list, by group: what users bring in CMD_FLAGS.txt.
BROUGHT = """
user-data-dir=x model=m lora=l model-dir=x lora-dir=x extensions=e verbose idle-timeout=3 multi-user model-menu
loader=llamacpp ctx-size=2048 n_ctx=2048 max_seq_len=2048 cache-type=q8_0 gpu-layers=3 tensor-split=1,2 split-mode=layer no-mmap
mlock no-kv-offload batch-size=256 ubatch-size=256 threads=2 threads-batch=2 parallel=1 extra-flags=x ik streaming-llm
model-draft=x draft-max=4 cpu cpu-memory=2 disk disk-cache-dir=x load-in-8bit bf16 load-in-4bit use_double_quant
compute_dtype=float16 quant_type=nf4 trust-remote-code force-safetensors attn-implementation=sdpa gpu-split=1,2 enable-tp
listen-port=1 share auto-launch gradio-auth=u:p subpath=/x api public-api api-port=1 api-key=x admin-key=x nowebui
temperature=1 top-p=1 repetition_penalty=1 enable-thinking reasoning-effort=low
notebook chat character=x n_batch=3 n-gpu-layers=2 wbits=4 model_type=llama groupsize=128 pre_layer=3 triton xformers deepspeed
"""


@pytest.mark.parametrize("flag", BROUGHT.split())
def test_what_users_bring_is_taken_or_warned_of(tmp_path: Path, flag: str) -> None:
    name, _, value = flag.partition("=")
    config = parse([f"--{name}", *([value] if value else [])], {}, root=tmp_path)
    assert len(config.warnings) <= 1


def test_flags_that_mean_the_same_are_translated(tmp_path: Path) -> None:
    config = read(tmp_path, "--bf16", "--cache-type", "q8_0", "--percent", "0", "100", "100", "0", "100", "0", "doctor")
    assert config.loader_options["dtype"] == "bfloat16"
    assert config.loader_options["cache_type_k"] == config.loader_options["cache_type_v"] == "q8_0"
    assert config.loader_options["percent"] == "0 100 100 0 100 0"
    assert config.command == "doctor"
    assert config.warnings == ()
    for words, expected in ((["--pin-weight", "False"], False), (["--pin-weight", "true"], True), (["--pin-weight"], True)):
        assert read(tmp_path, *words).loader_options["pin_weight"] is expected
    assert read(tmp_path, "--percent", "0 100 0 100 0 100", "doctor").loader_options["percent"] == "0 100 0 100 0 100"


def test_listening_to_others_needs_a_key(tmp_path: Path) -> None:
    for flags in (["--listen"], ["--listen-host", "192.168.1.5"], ["--listen-host", "::"]):
        with pytest.raises(ConfigError, match=r"--api-key.*--i-know"):
            read(tmp_path, *flags)
        assert not read(tmp_path, *flags, "--api-key", "k").is_loopback
        assert read(tmp_path, *flags, "--i-know").i_know
    assert read(tmp_path, "--listen-host", "::1").url == "http://[::1]:7860"
    assert read(tmp_path, "--listen", "doctor").command == "doctor"  # which does not listen


@pytest.mark.parametrize(
    "flags",
    [
        ["--listen-port", "70000"],
        ["--listen-port", "x"],
        ["--idle-timeout", "-1"],
        ["--ssl-keyfile", "k"],
        ["--subpath", "x"],
        ["--listen-port"],
    ],
)
def test_bad_values_are_one_line(tmp_path: Path, flags: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, *flags)
    assert "\n" not in str(caught.value)


def test_a_loaders_options_are_flags_under_every_name(tmp_path: Path) -> None:
    for spec in discover().values():
        for option in spec.options:
            if option.kind != "int":
                continue
            for name in (option.name, *option.aliases):
                value = int(option.minimum or 1)
                config = read(tmp_path, f"--{name}", str(value))
                assert config.options_for(spec.options)[option.name] == value, (spec.name, name)


def test_switches_of_a_loader_can_be_turned_both_ways(tmp_path: Path) -> None:
    options = [o for spec in discover().values() for o in spec.options if o.kind == "bool" and o.default is True]
    for option in options:
        flag = option.name.replace("_", "-")
        assert read(tmp_path, f"--no-{flag}").loader_options[option.name] is False


def test_adapters_are_looked_for_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    config = read(tmp_path, "--lora", "mine", "/far/away", "--lora-dir", str(tmp_path))
    assert config.lora_paths == (str(tmp_path / "mine"), str(Path("/far/away")))


def test_the_sample_file_is_the_defaults(tmp_path: Path) -> None:
    text = sample_file([*server_options(), *loader_option_rows()])
    keys = [line[1:] for line in text.splitlines() if line.startswith("#") and not line.startswith("# ")]
    values = yaml.safe_load("\n".join(keys))
    assert values["listen_port"] == 7860
    assert set(values) == {row.name for row in (*server_options(), *loader_option_rows())}
    (tmp_path / "config.yaml").write_text(
        "\n".join(k for k in keys if not k.startswith(("model_dir", "user_data", "preset", "lora_dir"))), encoding="utf-8"
    )
    from_file = read(tmp_path)
    default = read(tmp_path / "other")
    for row in server_options():
        if row.name not in ("user_data_dir", "settings"):
            assert getattr(from_file, row.name) == getattr(default, row.name), row.name


def test_every_row_has_help_and_a_flag_of_its_own() -> None:
    seen: set[str] = set()
    for row in (*server_options(), *loader_option_rows()):
        assert row.help.strip(), row.name
        assert seen.isdisjoint(row.flags()), row.name
        seen.update(row.flags())


def test_help_and_the_sample_file_print(tmp_path: Path) -> None:
    for flag, word in (("--help", "--listen-port"), ("--print-config", "#listen_port: 7860")):
        done = subprocess.run([sys.executable, "server.py", flag], cwd=ROOT, capture_output=True, text=True, check=True)
        assert word in done.stdout
    assert set(COMMANDS) <= set(
        subprocess.run(
            [sys.executable, "server.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_a_reader_that_has_enough_gets_no_traceback() -> None:
    for flag in ("--help", "--print-config"):
        with subprocess.Popen(
            [sys.executable, "server.py", flag], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            assert process.stderr.read() == b"" and process.wait() in (0, 1), flag


def test_the_command_line_is_read_without_heavy_imports() -> None:
    code = (
        "import sys; from modules.command_line import parse; parse(['--listen-port', '1']); "
        "print(','.join(m for m in ('torch', 'gradio', 'fastapi', 'numpy', 'pydantic', 'asyncio') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_server_py_says_a_problem_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "server.py", "--listen-port", "x"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "listen-port" in done.stderr


def test_a_bare_switch_of_theirs_gets_its_value(tmp_path: Path) -> None:
    assert read(tmp_path, "--numa", "--listen-port", "1").loader_options["numa"] == "distribute"
    assert read(tmp_path, "--numa", "isolate").loader_options["numa"] == "isolate"
    assert read(tmp_path, "--numa").loader_options["numa"] == "distribute"
