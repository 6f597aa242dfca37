"""A run goes to the hub: what is uploaded, what the card tells the hub, and what goes wrong."""

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCardData, metadata_load
from huggingface_hub.errors import OfflineModeIsEnabled

import aletheia
import aletheia.job.push as push_module
from aletheia.errors import ArtifactError, TrainingError
from aletheia.job.finish import push as push_as_asked
from aletheia.plain_yaml import parse_yaml

TRAINING = {"steps": 2, "batch_size": 2, "evaluations": 1, "save_steps": 1}
EXPECTED = {
    *("adapter_config.json", "adapter_model.safetensors", "README.md", "plan.json", "scores.json", "metrics.json"),
    *("report.html", "manifest.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
}


@pytest.fixture(scope="module")
def finished(model_folder, data_file, tmp_path_factory):
    """A run on a local model, whose card names a license, with checkpoints."""
    base = shutil.copytree(model_folder, tmp_path_factory.mktemp("base") / "tiny")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# Tiny\n")
    data = {"data": str(data_file), "max_length": 64}
    told = {"model": str(base), "dtype": "float32"}
    out = tmp_path_factory.mktemp("runs") / "run"
    return aletheia.fine_tune(told, data, out, {"policy": "last", "rank": 2}, TRAINING, say=lambda line: None)


@pytest.fixture
def run_folder(finished, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(finished.path, tmp_path / "run")


class Hub:
    """The client of the hub, which keeps what it is given."""

    def __init__(self):
        self.files, self.asked = {}, []

    def create_repo(self, repo, **options):
        self.asked.append(("create_repo", repo, options))
        return type("Made", (str,), {"repo_id": repo if "/" in repo else f"me/{repo}"})(f"https://hub/{repo}")

    def create_branch(self, repo, **options):
        self.asked.append(("create_branch", repo, options))

    def create_commit(self, repo, operations, **options):
        self.asked.append(("create_commit", repo, options))
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


@pytest.fixture
def hub(monkeypatch):
    """Stands where the hub's client would."""
    made = Hub()
    monkeypatch.setattr(push_module, "HfApi", lambda: made)
    return made


def written(hub, folder):
    """What was uploaded, as whoever downloads it has it."""
    folder.mkdir()
    for name, content in hub.files.items():
        (folder / name).write_bytes(content)
    return folder


def test_others_get_a_run_that_they_can_use_and_no_path_of_this_machine(finished, hub, tmp_path):
    (finished.path / "notes.txt").write_text("mine")
    done = aletheia.push(finished.path, "me/thing", base="someone/tiny")
    assert (finished.path / "checkpoints").is_dir()
    assert set(hub.files) == set(done.files) == EXPECTED
    here = (str(finished.path.parent), finished.metrics.model.name, finished.metrics.data.name)
    for name, content in hub.files.items():
        assert not [path for path in here if path.encode() in content], name
    theirs = aletheia.Run.read(written(hub, tmp_path / "theirs"))
    assert theirs.metrics.model.name == theirs.plan.model.name == "someone/tiny"
    assert theirs.metrics.held_out_curve == finished.metrics.held_out_curve
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "someone/tiny"
    model = aletheia.load(finished.metrics.model.name, "float32").model
    aletheia.load_adapter(model, tmp_path / "theirs")
    assert hub.asked[0] == ("create_repo", "me/thing", {"private": True, "exist_ok": True})


def test_the_hub_understands_the_card(finished, hub, tmp_path):
    aletheia.push(finished, "me/thing", base="someone/tiny")
    found = metadata_load(written(hub, tmp_path / "theirs") / "README.md")
    assert found == {
        "base_model": "someone/tiny",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "aletheia", "arxiv:2604.15351"],
        "license": "apache-2.0",
    }
    assert ModelCardData(**found).to_dict() == found
    assert "from_pretrained('someone/tiny')" in hub.files["README.md"].decode()


def test_data_sets_of_the_hub_are_named_and_files_are_not(run_folder):
    config = (run_folder / "config.yaml").read_text()
    sources = parse_yaml(config, "")["data"]["data"]
    (run_folder / "more.yaml").write_text(
        config.replace(sources[0], f"{sources[0]}\n  - someone/rows:main:train\n  - squad")
    )
    assert push_module._data_sets(run_folder / "more.yaml") == {"datasets": ["someone/rows", "squad"]}
    assert push_module._data_sets(run_folder / "config.yaml") == {}


def test_a_base_on_this_machine_is_named_nowhere_unless_its_id_is_given(finished, hub):
    said = []
    done = aletheia.push(finished, "me/thing", say=said.append)
    assert len(said) == 1
    assert "a path of this machine, so the card names no base; give its hub id with `base`" in said[0]
    assert "base_model" not in done.metadata
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] is None
    with pytest.raises(ArtifactError, match=r"`base` is .*; expected a hub id"):
        aletheia.push(finished, "me/thing", base=finished.metrics.model.name)


def test_a_card_that_was_rewritten_keeps_its_text(run_folder, hub):
    (run_folder / "README.md").write_text(
        "---\nlicense: mit\ntags: [mine]\nlanguage: de\n---\n\n# My own words\n---\nmore\n"
    )
    done = aletheia.push(run_folder, "me/thing", base="someone/tiny")
    text = hub.files["README.md"].decode()
    assert text.endswith("---\n\n# My own words\n---\nmore\n")
    assert done.metadata["base_model"] == "someone/tiny"
    assert (done.metadata["license"], done.metadata["language"]) == ("mit", "de")
    assert done.metadata["tags"] == ["mine", "lora", "aletheia", "arxiv:2604.15351"]


def test_a_dry_run_lists_what_would_be_uploaded(run_folder, hub, run):
    code, out, err = run("push", run_folder, "me/thing", "--base", "someone/tiny", "--dry-run")
    assert code == 0, err
    assert hub.asked == []
    assert {line.split()[-1] for line in out.splitlines()[: len(EXPECTED)]} == EXPECTED
    assert "base_model: someone/tiny" in out
    assert "me/thing would get 11 files" in err
    code, out, _ = run(
        "push", run_folder, "me/thing", "--base", "someone/tiny", "--json", "--public", "--revision", "v1"
    )
    assert json.loads(out)["files"].keys() == EXPECTED
    assert [(name, repo) for name, repo, _ in hub.asked] == [
        ("create_repo", "me/thing"), ("create_branch", "me/thing"), ("create_commit", "me/thing"),
    ]  # fmt: skip
    assert hub.asked[0][2]["private"] is False
    assert hub.asked[2][2]["revision"] == "v1"


def test_what_goes_wrong_is_said_in_one_line(run_folder, finished, monkeypatch, run, tmp_path):
    def refuse(self, *arguments, **options):
        raise OfflineModeIsEnabled("Cannot reach the hub")

    monkeypatch.setattr(push_module, "HfApi", type("Refusing", (), {"create_repo": refuse}))
    with pytest.raises(ArtifactError, match="HF_HUB_OFFLINE is set; unset it to reach the hub"):
        aletheia.push(finished, "me/thing")
    settings = aletheia.TrainSettings(push_to_hub=True, hub_model_id="thing")
    with pytest.raises(TrainingError, match=r"is complete, but uploading .* to thing failed: HF_HUB_OFFLINE"):
        push_as_asked(finished, settings, lambda line: None)
    for arguments, words in (
        ((tmp_path, "me/thing"), "no finished run"),
        ((run_folder, "not a name"), "REPO is 'not a name'"),
        ((run_folder, "me/thing", "--base", "a b"), "--base is 'a b'"),
    ):
        code, _, err = run("push", *arguments)
        assert code == 2
        assert words in err.splitlines()[-1]
    (run_folder / "plan.json").write_text("{}")
    assert run("push", run_folder, "me/thing")[0] == 2


# --- the hub's own client against a server that speaks its protocol


class Server(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs: repositories, what is uploaded how, commits."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.headers["Authorization"] != "Bearer hf_right":
            self.answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            self.answer(200, {"url": f"http://{self.headers['Host']}/me/thing"})
        elif self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/models/me/thing/preupload/main":
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path == "/api/models/me/thing/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer(
                200,
                {"commitUrl": f"http://{self.headers['Host']}/me/thing/commit/1", "commitOid": "1", "success": True},
            )
        else:
            self.answer(404, {"error": self.path})

    def do_GET(self):
        self.answer(404, {"error": self.path})

    def answer(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    """A hub on this machine."""
    made = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    made.made, made.cards, made.files = [], [], {}
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def push_there(server, folder, token):
    endpoint = f"http://127.0.0.1:{server.server_port}"
    told = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    told |= {"HF_TOKEN": token} if token else {"HF_TOKEN_PATH": "/nowhere", "HF_TOKEN": ""}
    code = "from aletheia.cli.main import main; main()"
    command = [sys.executable, "-c", code, "push", str(folder), "me/thing", "--base", "someone/tiny"]
    return subprocess.run(command, env=told, capture_output=True, text=True, timeout=300, check=False)


def test_the_hubs_own_client_uploads_it(server, run_folder):
    done = push_there(server, run_folder, "hf_right")
    assert done.returncode == 0, done.stderr
    assert server.files.keys() == EXPECTED
    assert server.files["adapter_model.safetensors"] == (run_folder / "adapter_model.safetensors").read_bytes()
    assert server.made[0]["name"] == "thing"
    assert server.made[0].get("private") or server.made[0]["visibility"] == "private"
    assert server.cards == [server.files["README.md"].decode()]
    assert "/me/thing has 11 files" in done.stderr


@pytest.mark.parametrize("token", [None, "hf_wrong"])
def test_without_a_token_it_says_how_to_get_one(server, run_folder, token):
    done = push_there(server, run_folder, token)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no valid token; log in with 'hf auth login', or set HF_TOKEN" in done.stderr
    assert server.files == {}
