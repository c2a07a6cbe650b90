"""Released files: found where they are, fetched where that is possible, and plain words where it is not."""

import http.server
import threading
from functools import partial

import pytest
from test_convert import CONFIG, CausalDiT

from cfrt import cli, hub, students
from cfrt.errors import WeightsError
from cfrt.official import AUTOENCODER, OFFICIAL, TEXT_ENCODER, File

pytestmark = pytest.mark.cpu

MODEL = "wan-1.3b-framewise-2step"
CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CFRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "_hub", lambda: None)
    return tmp_path / "cache"


class Ranges(http.server.SimpleHTTPRequestHandler):
    """A file server that knows ranges, says what was asked, and can break off."""

    asked: list[str | None]
    stop_after: int | None = None

    def do_GET(self):
        begin = self.headers.get("Range")
        self.asked.append(begin)
        start = int(begin.removeprefix("bytes=").rstrip("-")) if begin else 0
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start:][: self.stop_after])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    handler = type("Handler", (Ranges,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield handler, File(f"http://127.0.0.1:{running.server_port}", "small.pth", 0.0)
        running.shutdown()
        thread.join()


def test_placed_by_hand():
    assert hub.locate(AUTOENCODER) is None
    path = hub.place(AUTOENCODER)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    assert hub.locate(AUTOENCODER) == path
    assert hub.fetch(AUTOENCODER) == path
    assert AUTOENCODER not in hub.missing(hub.needs(MODEL))


def test_a_folder_placed_by_hand():
    folder = hub.place(TEXT_ENCODER)
    assert folder.name == "text_encoder"
    folder.mkdir(parents=True)
    assert hub.locate(TEXT_ENCODER) is None, "an empty folder is no text encoder"
    (folder / "config.json").write_text("{}")
    assert hub.locate(TEXT_ENCODER) == folder


def test_offline_says_what_to_put_where():
    with pytest.raises(WeightsError) as error:
        hub.fetch(OFFICIAL[MODEL])
    said = str(error.value)
    assert "HF_HUB_OFFLINE" in said
    assert OFFICIAL[MODEL].address in said
    assert str(hub.place(OFFICIAL[MODEL])) in said


def test_without_the_hub_library(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(WeightsError, match=r"huggingface_hub \(pip install"):
        hub.fetch(AUTOENCODER)


class FakeHub:
    """huggingface_hub as far as it is used: `here` is what its cache holds, `there` what the network adds."""

    class errors:
        class HfHubHTTPError(Exception):
            pass

        class LocalEntryNotFoundError(HfHubHTTPError, FileNotFoundError):
            pass

    def __init__(self, root, here, there, answers=True):
        self.root, self.here, self.there, self.asked = root, set(here), set(there), []
        self.refusal = self.errors.HfHubHTTPError if answers else self.errors.LocalEntryNotFoundError

    def hf_hub_download(self, repository, path, *, local_files_only):
        if path in self.here or (path in self.there and not local_files_only):
            target = self.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(b"x")
            return str(target)
        if not local_files_only:
            self.asked.append(path)
        raise (OSError if local_files_only else self.refusal)("not there")

    def snapshot_download(self, repository, *, allow_patterns, local_files_only):
        (pattern,) = allow_patterns
        return str(
            self.hf_hub_download(repository, pattern.replace("*", "config.json"), local_files_only=local_files_only)
        ).removesuffix(pattern.replace("*", "config.json"))


def test_through_the_hub(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    fake = FakeHub(tmp_path, [AUTOENCODER.path], ["text_encoder/config.json"])
    monkeypatch.setattr(hub, "_hub", lambda: fake)
    assert hub.locate(AUTOENCODER) == tmp_path / AUTOENCODER.path
    assert hub.locate(TEXT_ENCODER) is None
    assert hub.fetch(TEXT_ENCODER) == tmp_path / "text_encoder"
    with pytest.raises(WeightsError, match=r"the hub does not give causal-forcing"):
        hub.fetch(OFFICIAL[MODEL])


def test_plain_http(server):
    handler, file = server
    told = []
    path = hub.fetch(file, told.append)
    assert path.read_bytes() == CONTENT
    assert sum(told) == len(CONTENT)
    hub.fetch(file)
    assert handler.asked == [None], "a file that is here is not asked for again"


def test_a_broken_download_goes_on(server):
    handler, file = server
    handler.stop_after = 1000
    with pytest.raises(WeightsError, match="expected 10240 bytes, got 1000"):
        hub.fetch(file)
    assert hub.locate(file) is None, "half a file is no file"
    handler.stop_after = None
    assert hub.fetch(file).read_bytes() == CONTENT
    assert handler.asked == [None, "bytes=1000-"]


def test_nobody_answers(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(WeightsError, match="cannot be fetched"):
        hub.fetch(File("http://127.0.0.1:9", "small.pth", 0.0))


# ---------------------------------------------------------------------- the command


def test_dry_run_lists_everything(capsys):
    assert cli.main(["pull", MODEL, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("missing") for line in lines)


@pytest.mark.parametrize("offline", [True, False], ids=["forbidden", "nobody there"])
def test_a_pull_that_cannot_fetch(offline, monkeypatch, capsys):
    """A table on standard output, one line of error, no bars: file by file what to put where."""
    if not offline:
        monkeypatch.delenv("HF_HUB_OFFLINE")
        fake = FakeHub(None, [], [], answers=False)
        monkeypatch.setattr(hub, "_hub", lambda: fake)
        monkeypatch.setattr(hub, "urlopen", partial(_raise, OSError("no route")))
    assert cli.main(["pull", MODEL, "--decoder", "taehv"]) == 1
    out, err = capsys.readouterr()
    rows = out.splitlines()
    files = hub.needs(MODEL, decoder="taehv")
    assert rows[::2] == [f"{file.gigabytes:6.2f} GB  {file.address}" for file in files]
    assert rows[1::2] == [f"       to  {hub.place(file)}" for file in files]
    assert "5 files are missing" in err.splitlines()[-1]
    assert ("HF_HUB_OFFLINE is set" in err) == offline
    assert len(err.splitlines()) == (1 if offline else 3), "the hub is asked once, and so is the other server"
    assert "%|" not in err
    assert offline or fake.asked == [OFFICIAL[MODEL].path]


def _raise(error, *_, **__):
    raise error


def test_an_unreleased_model(capsys):
    assert cli.main(["pull", "tiny"]) == 1
    assert "no released file for 'tiny'" in capsys.readouterr().err


def test_a_preset_says_how_to_fetch_it():
    with pytest.raises(WeightsError, match=f"cfrt pull {MODEL}"):
        students.find(MODEL)


def test_pull_makes_a_model(tmp_path, monkeypatch, capsys):
    """From placed files to a folder that `find` gives: at small size, under the release's names."""
    import torch

    from cfrt import convert
    from cfrt.config import PRESETS

    monkeypatch.setitem(PRESETS, MODEL, CONFIG)
    torch.manual_seed(0)
    save = partial(torch.save, {"generator_ema": CausalDiT(CONFIG).state_dict()})
    for file, write in ((OFFICIAL[MODEL], save), (AUTOENCODER, partial(torch.save, {"conv2.bias": torch.ones(2)}))):
        hub.place(file).parent.mkdir(parents=True, exist_ok=True)
        write(hub.place(file))
    assert cli.main(["pull", MODEL, "--no-text"]) == 0
    assert students.find(MODEL) == hub.model_folder(MODEL)
    assert "is ready" in capsys.readouterr().out
    assert convert.plan(students.find(MODEL), layout="diffusers").config == CONFIG


def test_convert_and_plan_commands(tmp_path, capsys):
    assert cli.main(["convert", str(tmp_path / "nothing.pt"), str(tmp_path / "out"), "--model", MODEL]) == 1
    assert "found no such file" in capsys.readouterr().err
    assert cli.main(["plan", "--gpu", "24GB"]) == 0
    assert "fits into 24.0 GB" in capsys.readouterr().out
    assert cli.main(["plan", "--gpu", "lots"]) == 1
    assert "expected a size such as 24GB" in capsys.readouterr().err
