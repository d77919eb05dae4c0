"""The command line as a user types it: output, exit codes, one line for a mistake. Most verbs run in this process, as
importing torch anew for each would take minutes; help, caches, laziness and Ctrl-C are tried on whole processes."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from families import tiny_hf, tiny_tokenizer
from filelock import FileLock
from typer.testing import CliRunner

import workbench as wb
from workbench.cli import app

COMMAND = [sys.executable, "-c", "from workbench.cli import main; main()"]


def process(*arguments, **options):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300, **options)


def command(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_hf("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mapped(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("map")
    done = command("map-neurons", "--model", model, "--side", "all", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done


def one_line(done, code, text):
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("workbench: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert text in lines[0]
    assert done.stdout == ""


def test_help_names_every_verb():
    done = process("--help")
    assert done.returncode == 0
    for verb in ("models", "pull", "verify", "map-neurons", "find-neurons", "scan", "generate", "clamp"):
        assert verb in done.stdout


def test_map_neurons_shows_and_writes(mapped):
    out, done = mapped
    assert "The most telling neurons of" in done.stdout
    assert "of 144 neurons stand for their word more than 99 % of random directions do" in done.stdout
    assert "find-neurons" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "neurons.html", "neurons.parquet", "neurons_bottom.parquet", "null.parquet", "run.json", "tokens.parquet",
    ]  # fmt: skip
    page = (out / "neurons.html").read_text()
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)  # everything it needs is in it


def test_map_neurons_json(model, tmp_path):
    done = command("map-neurons", "--model", model, "--out", tmp_path, "--show", 3, "--no-plot", "--json")
    answer = json.loads(done.stdout)
    assert answer["settings"]["sides"] == ["up"]
    assert len(answer["specialised"]) == 3
    assert answer["summary"][0]["neurons"] == 144
    assert not (tmp_path / "neurons.html").exists()


def test_a_streamed_map_is_the_same(model, mapped, tmp_path):
    arguments = ("map-neurons", "--model", model, "--side", "all", "--out", tmp_path, "--no-plot", "--stream", "--no-check")
    assert command(*arguments).returncode == 0
    assert command("compare-maps", mapped[0], tmp_path, "--model-a", model, "--model-b", model, "--json").returncode == 0
    for name in ("neurons.parquet", "neurons_bottom.parquet", "null.parquet"):
        assert (tmp_path / name).read_bytes() == (mapped[0] / name).read_bytes()


def test_find_neurons(mapped):
    out, _ = mapped
    done = command("find-neurons", "DOG", "--map", out, "--json", "-n", 1000)
    answer = json.loads(done.stdout)
    assert answer["total"] == len(answer["neurons"]) > 0
    assert {row["token"].strip().lower() for row in answer["neurons"]} == {"dog"}
    shown = command("find-neurons", " dog", "--exact", "--map", out)
    assert "·dog" in shown.stdout
    nothing = command("find-neurons", "dog", "--map", out, "--max-rank", 0, "--layers", "0", "--side", "up", "--json")
    assert nothing.returncode == 0


def test_find_neurons_imports_neither_torch_nor_pandas(mapped):
    out, _ = mapped
    code = (
        "import sys; sys.argv = ['workbench', 'find-neurons', 'dog', '--map', sys.argv[1]]\n"
        "from workbench.cli import main\n"
        "try: main()\n"
        "except SystemExit: print([m for m in ('torch', 'pandas', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_verify(model):
    done = command("verify", "--model", model)
    assert done.returncode == 0
    assert "all identities hold" in done.stdout
    answer = json.loads(command("verify", "--model", model, "--json", "--dtype", "bfloat16").stdout)
    assert answer["passed"] is True
    assert answer["settings"]["dtype"] == "bfloat16"
    assert {"identity", "layer", "error", "tolerance", "verdict", "why"} == set(answer["checks"][0])


def test_verify_saves_and_shows_every_layer(model, tmp_path):
    done = command("verify", "--model", model, "--every-layer", "--save", tmp_path / "v.json")
    saved = json.loads((tmp_path / "v.json").read_text())
    assert len([line for line in done.stdout.splitlines() if line.endswith(" ok")]) == len(saved["checks"])
    refused = command("verify", "--model", model, "--save", tmp_path / "no" / "v.json")
    assert refused.returncode == 2
    assert "could not be written" in refused.stderr


def test_sites(model):
    shown = command("sites", "--model", model).stdout
    assert "input of model.layers.{l}.mlp.down_proj" in shown
    assert "this layer has no experts to choose from" in shown
    answer = json.loads(command("sites", "--model", model, "--json").stdout)
    found = {site["site"]: site for site in answer["sites"]}
    assert found["resid_mid"]["writable"] is False
    assert found["mlp_post"]["transformer_lens"] == "blocks.{l}.mlp.hook_post"


def test_families():
    assert json.loads(command("families", "--json").stdout)["families"][0]["family"] == "bloom"
    assert command("families", "--markdown").stdout.startswith("| family | blocks |")


def test_models_json(smollm):
    answer = json.loads(command("models", "--json").stdout)
    assert answer["models"][0]["name"] == "smollm2-135m-instruct"


def test_models_lists_hugging_faces_cache(model, tmp_path):
    repo = tmp_path / "models--some--llama"
    shutil.copytree(model, repo / "snapshots" / "abc")
    (repo / "snapshots" / "abc" / "README.md").write_text("---\nlicense: mit\n---\n")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    listed = json.loads(process("models", "--json", env=os.environ | {"HF_HUB_CACHE": str(tmp_path)}).stdout)["models"]
    found = next(entry for entry in listed if entry["name"] == "some/llama")
    assert (found["kind"], found["state"], found["licence"]) == ("cached", "ready", "mit")
    done = process("verify", "--model", "some/llama", env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert done.stdout.startswith("some/llama (llama, float32 on cpu): all identities hold")


def test_pull_when_it_is_there(smollm):
    answer = json.loads(command("pull", "--json").stdout)
    assert answer["model"] == "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["verify", "--model", "nobody/nothing"], "is not embedded, is no folder, is not cached"),
        (["verify", "--model", "./nowhere"], "Folder './nowhere' does not exist"),
        (["pull", "gpt5"], "'gpt5' is not an embedded model"),
        (["verify", "--model", "MODEL", "--dtype", "int3"], "--dtype 'int3' is not known"),
        (["verify", "--model", "MODEL", "--device", "nonsense"], "device='nonsense' cannot be used here"),
        (
            ["map-neurons", "--model", "MODEL", "--layers", "9", "--out", "OUT"],
            "Layers '9' do not lie in this model of 3 layers",
        ),
        (
            ["map-neurons", "--model", "MODEL", "--reading", "gain", "--side", "down", "--out", "OUT"],
            "side 'down' is what it writes",
        ),
        (["map-neurons", "--model", "MODEL", "--out", "OUT/file"], "cannot be written"),
        (["map-neurons", "--model", "MODEL", "--out", "/proc/nothing"], "cannot be written"),
        (["find-neurons", "dog", "--map", "OUT"], "run.json' does not exist"),
        (["find-neurons", "zzzz", "--map", "MAP"], "'zzzz' (folded) is no single token"),
        (["find-neurons", "(", "--regex", "--map", "MAP"], "is not a regular expression"),
        (["find-neurons", "dog", "--regex", "--exact", "--map", "MAP"], "exclude each other"),
        (["find-neurons", "dog", "--layers", "9", "--map", "MAP"], "Layers '9' do not lie in this model"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, text, model, mapped, tmp_path):
    (tmp_path / "file").touch()
    places = {"MODEL": model, "OUT": tmp_path, "MAP": mapped[0]}
    arguments = [str(places.get(a, a)).replace("OUT/", f"{tmp_path}/") for a in arguments]
    one_line(command(*arguments), 2, text)


def test_a_wrong_option_is_exit_code_2():
    done = command("find-neurons", "dog", "--map", ".", "--side", "left")
    assert done.returncode == 2
    assert "--side" in done.stderr


def test_ctrl_c_leaves_no_half_written_file_and_the_job_goes_on(smollm, tmp_path):
    arguments = ["map-neurons", "--layers", "0:2", "--out", str(tmp_path), "--no-plot"]
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores Ctrl-C
    job = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heeds)
    while not list(tmp_path.glob(".neuron-map-parts/*-up-0.safetensors")):
        time.sleep(0.05)
        assert job.poll() is None
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 130, errors
    assert "workbench: stopped. Nothing half-written is left" in errors
    kept = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert kept
    assert all(re.fullmatch(r"[0-9a-f]{16}-up-\d\.safetensors", name) for name in kept), kept
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / ".neuron-map-parts").exists()
    assert (tmp_path / "run.json").exists()


def test_scan_fits_a_screen_and_says_what_the_model_says(model):
    done = command("scan", "--model", model, "--prompt", "a dog")
    assert done.returncode == 0, done.stderr
    for heading in ("What comes next", "Where ", "Which parts write ", "From which tokens the heads take it"):
        assert heading in done.stdout
    assert len(done.stdout.splitlines()) <= 45
    answer = json.loads(command("scan", "--model", model, "--prompt", "a dog", "--json").stdout)
    assert [row["rank"] for row in answer["forms"]][-1] == 0
    assert sum(row["contribution"] for row in answer["parts"]) == pytest.approx(answer["settings"]["logit"], rel=1e-4)


def test_edits_from_a_file_are_those_of_python(model, tmp_path):
    edits = wb.save_edits(tmp_path / "edits.json", [wb.add("resid_post.1", torch.linspace(-9, 9, 32))])
    done = command("generate", "--model", model, "--prompt", "a dog", "--edits", edits, "--json")
    answer = json.loads(done.stdout)
    loaded = wb.load(model)
    assert answer["text"] == loaded.generate("a dog")
    with wb.intervene(loaded, *wb.load_edits(edits)):
        assert answer["edited"] == loaded.generate("a dog")
    assert answer["edited"] != answer["text"]
    words = command("generate", "--model", model, "--prompt", "a dog", "--edits", edits)
    assert "as it is:  a dog" in words.stdout
    assert "add('resid_post.1', vector=[32])" in words.stderr
    scanned = json.loads(command("scan", "--model", model, "--prompt", "a dog", "--edits", edits, "--json").stdout)
    with wb.intervene(loaded, *wb.load_edits(edits)):
        assert scanned["edits"] == list(map(repr, wb.load_edits(edits)))
        assert sum(row["contribution"] for row in scanned["parts"]) == pytest.approx(scanned["settings"]["logit"], rel=1e-4)
        assert scanned["predictions"][0]["token_id"] == int(loaded.forward(loaded.tokenize("a dog"))[0, -1].argmax())


def test_clamp(model, tmp_path):
    page = tmp_path / "clamp.html"
    done = command("clamp", "1.3", "-m", model, "-p", "a dog", "-p", "b", "--random", 4, "--max-new-tokens", 3, "--plot", page)
    assert done.returncode == 0, done.stderr
    assert "Neuron 1.3 (up) of" in done.stdout
    assert done.stdout.count("before (") == 2
    assert page.stat().st_size > 1e6
    arguments = ("clamp", "1.3", "-m", model, "-p", "a", "--random", 4, "--max-new-tokens", 1, "--word", " dog", "--json")
    answer = json.loads(command(*arguments).stdout)
    assert answer["settings"]["words"] == [" dog"]
    assert len(answer["words"]) == 5
    by_id = json.loads(command(*arguments[:-2], "id:250", "--json").stdout)
    assert by_id["settings"]["word_ids"] == [250]
    assert len(answer["generations"]) == 6


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["clamp", "dog", "-p", "a"], "Neuron 'dog' is not understood. Write its layer and number: 12.345"),
        (["clamp", "1.48", "-p", "a"], "Neuron 48 does not exist in layer 1, which has 48"),
        (["clamp", "9.1", "-p", "a"], "Layer 9 is not in"),
        (["scan", "-p", ""], "Text 0 is empty"),
        (["scan", "-p", "a" * 65], "has 65 tokens, and the context of"),
        (["scan", "-p", "a", "--target", "no such"], "'no such' is no single token"),
        (["generate", "-p", "a", "--edits", "nowhere.json"], "'nowhere.json' does not exist"),
        (["generate", "-p", "a", "--chat"], "has no chat template"),
    ],
)
def test_mistakes_of_prompts_are_one_line(model, arguments, text):
    one_line(command(*arguments, "--model", model), 2, text)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(f"{i} dogs and a cat" for i in range(40)))
    return path


def test_capture_writes_a_store_and_its_run(model, text, tmp_path):
    arguments = ("capture", "-m", model, "-c", text, "--sites", "resid_post.0,blocks.1.attn.hook_z", "-o", tmp_path / "out")
    arguments = (*arguments, "--store-dtype", "float16", "--max-tokens", 300, "--packed", "--bos", "row", "--shard-tokens", 100)
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"ActivationStore\(.*: 300 tokens of 'texts' through .*, 2 sites, float16, [\d.]+ kB\)\n", done.stdout)
    assert "store.read('resid_post.0')" in done.stderr
    store = wb.ActivationStore(tmp_path / "out")
    corpus = wb.Corpus(text, packed=True, bos="row", max_tokens=300)
    batches = list(wb.stream(wb.load(model), corpus, store.sites, dtype=torch.float16, progress=False))
    for site in store.sites:
        assert torch.equal(store.read(site), torch.cat([batch[site] for batch in batches]))
    run = json.loads((tmp_path / "out/run.json").read_text())["run"]
    assert run["corpus"]["tokens_hash"] == store.settings["tokens_hash"]
    assert run["sites"] == store.sites == ["resid_post.0", "z.1"]
    assert sorted(os.path.basename(file) for file in run["outputs"]) == ["index.json", "tokens.parquet"]
    again = json.loads(command(*arguments, "--json").stdout)
    assert (again["tokens"], again["settings"]) == (300, store.settings)
    assert again["plan"]["tokens_hash"] == store.settings["tokens_hash"]
    one_line(command(*arguments, "--batch-tokens", 9), 2, "batch_tokens was 2048 and is now 9")


def test_capture_says_what_it_will_take_and_writes_nothing(model, text, tmp_path):
    arguments = ("capture", "-m", model, "-c", text, "--sites", "resid_post", "-o", tmp_path / "out", "--dry-run")
    done = command(*arguments)
    assert re.fullmatch(
        r"40 documents, 40 rows, [\d,]+ tokens in 1 batches \([\d.]+% padding\); keeps [\d.]+ kB; about [\d.]+ s "
        r"\([\d,]+ tokens/s\); peak memory [\d.]+ [MG]B\n",
        done.stdout,
    )
    answer = json.loads(command(*arguments, "--json", "--store-dtype", "float32").stdout)
    assert answer["plan"]["bytes"] == answer["plan"]["tokens"] * 3 * 32 * 4
    assert answer["settings"]["kept_dtype"] == "float32"
    assert answer["settings"]["row_length"] == 64
    assert not (tmp_path / "out").exists()


def test_massive_tokens_need_not_be_told(model, text, tmp_path):
    done = command("capture", "-m", model, "-c", text, "--sites", "z.0", "-o", tmp_path / "o", "--massive-at", "none", "--json")
    answer = json.loads(done.stdout)
    assert answer["settings"]["massive_at"] is None
    assert json.loads((tmp_path / "o/index.json").read_text())["median_norm"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--corpus", "nowhere.txt"], "'nowhere.txt' is no file, and no shipped corpus. Shipped ones: handbook, wikipedia"),
        (["--column", "body", "--corpus", "JSON"], "has no text in 'body'; it has text. Name it with column="),
        (["--sites", "resid_post.9"], "do not lie in this model of 3 layers"),
        (["--sites", "pattern.1"], "Site 'pattern.1' holds pairs of tokens"),
        (["--sites", "router_logits.1"], "this layer has no experts to choose from"),
        (["--length", 65], "Rows of 65 tokens do not fit the context of"),
        (["--max-bytes", "1e3"], "more than the 1 kB allowed. Take fewer sites, layers or tokens, or a smaller dtype"),
        (["--massive-at", "resid_post"], "names 3 sites where one is wanted"),
        (["--out", "OUT/texts.txt"], "cannot be written"),
    ],
)  # fmt: skip
def test_mistakes_of_captures_are_one_line(model, text, tmp_path, arguments, said):
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n')
    chosen = {"--corpus": text, "--sites": "resid_post", "--out": tmp_path / "out"}
    for option, value in zip(arguments[::2], arguments[1::2], strict=True):
        chosen[option] = {"JSON": tmp_path / "c.jsonl"}.get(value, str(value).replace("OUT", str(tmp_path)))
    one_line(command("capture", "-m", model, *(part for pair in chosen.items() for part in pair)), 2, said)
    assert not (tmp_path / "out/.job").exists()


def test_a_folder_in_use_is_one_line(model, text, tmp_path):
    with FileLock(tmp_path / ".lock"):
        one_line(command("capture", "-m", model, "-c", text, "--sites", "z.0", "-o", tmp_path), 2, "Another job is writing to")


def test_corpora_lists_what_is_shipped():
    answer = json.loads(command("corpora", "--json").stdout)["corpora"]
    assert set(answer) == {"wikipedia", "wordnet", "handbook"}
    done = command("corpora")
    for name, about in answer.items():
        assert name in done.stdout
        assert f"{about['documents']:,}" in done.stdout
        assert about["closeness"] in done.stderr


def test_linearity_shows_writes_and_answers_in_json(model, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(" ".join(f"word{(i * 7 + j * j) % 97}" for j in range(12)) for i in range(30)))
    done = command("linearity", "--model", model, "--corpus", texts, "--out", tmp_path / "out", "--loss-tokens", 100)
    assert done.returncode == 0, done.stderr
    assert "As published" in done.stdout
    assert "published  ordinary  held_out" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "damage.parquet", "linearity.html", "linearity.parquet", "run.json",
    ]  # fmt: skip
    found = wb.Linearity.load(tmp_path / "out")
    done = command(
        "linearity", "--model", model, "--corpus", texts, "--out", tmp_path / "out", "--no-damage", "--no-null", "--json"
    )
    answer = json.loads(done.stdout)
    assert answer["damage"] is None
    assert answer["table"][0]["in_sample"] == pytest.approx(found.table["in_sample"][0])
    one_line(
        command("linearity", "--model", model, "--corpus", texts, "--out", tmp_path, "--max-tokens", 90), 2, "kind='ridge'"
    )


def test_transport_shows_writes_and_answers_in_json(model, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(" ".join(f"word{(i * 7 + j * j) % 97}" for j in range(12)) for i in range(30)))
    out = ("--out", tmp_path / "out")
    done = command(
        "transport", "--model", model, "--corpus", texts, *out, "--pairs", "1>2,0>3", "--directions", "principal:3",
        "--directions", "random:3", "--routes", 200, "--damage", 100, "--fisher-tokens", 50,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 pairs of" in done.stdout
    assert "restores" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "curves.html", "curves.parquet", "damage.parquet", "decay.html", "directions.html", "directions.parquet",
        "routes.parquet", "run.json", "transport.html", "transport.parquet",
    ]  # fmt: skip
    found = wb.TransportScores.load(tmp_path / "out")
    assert found.directions is not None
    assert len(found.directions) == 12
    done = command("transport", "--model", model, "--corpus", texts, *out, "--no-closely", "--weigh", "none", "--json")
    answer = json.loads(done.stdout)
    assert len(answer["transport"]) == 6
    assert answer["curves"] is None
    assert not list((tmp_path / "out").glob("curves.*")), "nothing of the run before is left"
    own = {(row["from"], row["to"]): row["held_out"] for row in answer["transport"]}
    assert own[1, 2] == pytest.approx(found.table["held_out"][1], abs=1e-6)
    one_line(command("transport", "--model", model, "--corpus", texts, *out, "--pairs", "2>1"), 2, "ends before it begins")
    wrong = ("--pairs", "1>2", "--directions", "principal:many")
    one_line(command("transport", "--model", model, "--corpus", texts, *out, *wrong), 2, "principal:32")


def test_lenses_of_every_kind_are_fitted_and_measured(model, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(" ".join(f"word{(i * 7 + j * j) % 97}" for j in range(12)) for i in range(30)))
    short = ("--corpus", texts, "--max-tokens", "300")
    kinds = {"tuned": "KL to the output", "jacobian": "jacobian, 3 maps", "jacobian_same_position": "3 maps"}
    for kind, said in kinds.items():
        done = command("fit-lens", "--model", model, *short, "--kind", kind, "--out", tmp_path / kind)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == ["run.json", "transports.safetensors"]
    both = ("--lens", tmp_path / "tuned", "--lens", tmp_path / "jacobian")
    measured = ("lens-quality", "--model", model, "--corpus", texts, *both)
    done = command(*measured, "--out", tmp_path / "quality")
    assert done.returncode == 0, done.stderr
    assert "blocks saved at a wanted agreement" in done.stdout
    answer = json.loads(command(*measured, "--layers", "0", "--json").stdout)
    assert {row["lens"] for row in answer["table"]} == {"logit", "tuned", "jacobian"}
    assert answer["saved"] is None
    versus = ("--versus", "the dog", "--out", tmp_path / "view")
    done = command(
        "lens", "--model", model, "--prompt", "the cat", "--lens", tmp_path / "tuned", *versus, "--site", "resid_post"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "view" / "difference.html").exists()


def test_lenses_are_read_fitted_and_answered_in_json(model, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(" ".join(f"word{(i * 7 + j * j) % 97}" for j in range(12)) for i in range(30)))
    done = command("lens", "--model", model, "--prompt", "the cat", "--out", tmp_path / "view")
    assert done.returncode == 0, done.stderr
    assert "logit lens of" in done.stdout
    assert sorted(path.name for path in (tmp_path / "view").iterdir()) == [
        "lens.html", "lens.parquet", "positions.parquet", "run.json", "trajectories.html",
    ]  # fmt: skip
    done = command("fit-lens", "--model", model, "--corpus", texts, "--out", tmp_path / "lens")
    assert done.returncode == 0, done.stderr
    assert "held-out R² of the last state" in done.stdout
    done = command("lens", "--model", model, "--prompt", "the cat", "--lens", tmp_path / "lens", "--layers", "1", "--json")
    answer = json.loads(done.stdout)
    assert answer["settings"]["lens"] == "shortcut"
    assert [row["layer"] for row in answer["by_layer"]] == [1, 2]
    one_line(command("lens", "--model", model, "--prompt", "the cat", "--lens", tmp_path / "none"), 2, "does not exist")
    one_line(command("lens", "--model", model, "--prompt", "the cat", "--kind", "tuned"), 2, "No tuned lens is shipped")
    one_line(command("lens", "--model", model, "--prompt", "the cat", "--versus", "a dog"), 2, "--out")
    two = ("--kind", "logit", "--lens", tmp_path / "lens")
    one_line(command("lens", "--model", model, "--prompt", "the cat", *two), 2, "name two lenses")
    other = ("--epochs", "2", "--out", tmp_path / "l")
    one_line(command("fit-lens", "--model", model, "--corpus", texts, *other), 2, "belongs to a tuned lens")
    logit = ("--kind", "logit", "--out", tmp_path / "l")
    one_line(command("fit-lens", "--model", model, "--corpus", texts, *logit), 2, "as they are")
    one_line(command("lens", "--model", model, "--prompt", ""), 2, "empty")


def test_backward_lens_shows_writes_and_answers_in_json(model, tmp_path):
    ask = ("backward-lens", "--model", model, "--prompt", "the cat", "--target", "id:7")
    done = command(*ask, "--step", "1e-3", "--beside", "a dog", "--out", tmp_path / "view")
    assert done.returncode == 0, done.stderr
    assert "was foretold with" in done.stdout
    assert "beside" in done.stdout
    assert sorted(path.name for path in (tmp_path / "view").iterdir()) == [
        "backward_lens.parquet", "forecast", "forecast.html", "gradient.html", "matrices.parquet", "run.json",
        "targets.parquet", "vectors.parquet",
    ]  # fmt: skip
    answer = json.loads(command(*ask, "--layers", "1", "--matrices", "W_in,W_out", "--step", "1e-3", "--json").stdout)
    assert {row["matrix"] for row in answer["matrices"]} == {"W_in", "W_out"}
    assert {row["layer"] for row in answer["table"]} == {1}
    assert answer["targets"][0]["target_id"] == 7
    assert answer["forecast"][0]["group"] == "prompt"
    one_line(command(*ask, "--beside", "a dog"), 2, "Say with --step")
    one_line(command(*ask, "--matrices", "W_X"), 2, "No matrix is called 'W_X'")
    one_line(command(*ask[:-1], "id:x"), 2, "holds no token ids")
    one_line(command(*ask[:-1], ""), 2, "has no tokens")


def test_shift_edits_and_saves_a_model(model, tmp_path):
    ask = ("shift", "--model", model, "--prompt", "the cat", "--target", "id:7", "--layer", 1, "--max-new-tokens", 2)
    done = command(*ask, "--strength", 3, "--save", tmp_path / "edited")
    assert done.returncode == 0, done.stderr
    edited = next(line for line in done.stdout.splitlines() if line.startswith("edited"))
    again = command("generate", "--model", tmp_path / "edited", "--prompt", "the cat", "--max-new-tokens", 2).stdout.strip()
    assert repr(again) == edited.removeprefix("edited").strip()
    answer = json.loads(command(*ask, "--beside", "a", "--json").stdout)
    assert [len(answer[name]) for name in ("before", "edited", "random")] == [2, 2, 2]
    one_line(command(*ask, "--save", tmp_path / "edited"), 2, "is not empty")
    one_line(command("edit-facts", "--model", model, "--facts", 2), 2, "knows 0 of 2 facts")
    one_line(command("edit-facts", "--model", model, "--strengths", "a"), 2, "are no numbers")
