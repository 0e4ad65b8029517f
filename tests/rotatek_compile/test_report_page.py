"""The inspection page: well formed, self-contained, escaped, its numbers where they belong; and how it is written."""

import json
import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from rotatek_compile.errors import RotateKError
from rotatek_compile.geometry import Geometry, LayerGeometry
from rotatek_compile.kernels.slabs import Slabs
from rotatek_compile.markup import short, tenth
from rotatek_compile.plan import HeadPlan
from rotatek_compile.report_page import page, refuse_page, write_page

DIM = 32
VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = """"><script>alert(1)</script><img src=x onerror=alert(2)>'&<b>\u202e"""


class Tree(HTMLParser):
    """Builds an element tree; fails where a start and an end tag do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.root, self.open = ElementTree.Element("document"), []
        self.open.append(self.root)
        self.feed(text)
        self.close()
        assert self.open == [self.root], [e.tag for e in self.open]

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs)), attrs
        made = ElementTree.SubElement(self.open[-1], tag, {k: v or "" for k, v in attrs})
        if tag not in VOID:
            self.open.append(made)

    def handle_endtag(self, tag):
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data):
        here = self.open[-1]
        if len(here):
            here[-1].tail = (here[-1].tail or "") + data
        else:
            here.text = (here.text or "") + data


def parse(text):
    return Tree(text).root


def words(element):
    return " ".join("".join(element.itertext()).split())


def section(root, name):
    return root.find(f".//section[@id='{name}']")


def tables(part):
    """Cells of every table, by row."""
    return [[[words(cell) for cell in row] for row in t.iter("tr")] for t in part.iter("table")]


@pytest.fixture
def artifact(make_artifact):
    made = make_artifact([[8, 16], [0, 32], [24, 8]], span="all", levels=(Slabs(), Slabs(8)), keep_ratio=0.5)
    for i in range(3):
        for kind in ("visual", "text"):
            made.tensors[f"layers.{i}.{kind}.key_spectrum"] = (0.5 ** torch.arange(DIM)).expand(2, DIM).clone()
        made.tensors[f"layers.{i}.key_sensitivity"] = torch.tensor([[0.4, 0.1], [0.2 * i, 0.0]])
        del made.tensors[f"layers.{i}.value_sensitivity"]  # as in the first versions, which stored Values as they are
        made.tensors[f"layers.{i}.knockout"] = torch.tensor([0.5, 0.015 * i])
    made.base_model = {"id": "org/model", "revision": None, "fingerprint": None}
    made.report = {"plan_kl": 0.25}
    return made


def test_every_section_has_plots_with_words_and_numbers_behind_them(artifact):
    root = parse(page([artifact]))
    names = ["ranks", "knockouts", "cuts", "spectra", "variance", "angles", "errors", "budgets", "bytes"]
    assert [part.get("id") for part in root.iter("section")] == names
    for part in root.iter("section"):
        plots = list(part.iter("svg"))
        assert plots and all(svg.get("role") == "img" and len(svg.get("aria-label")) > 20 for svg in plots)
        assert all(t.findall("./thead/tr/th") and t.findall("./tbody/tr") for t in part.iter("table"))
        for found in part.iter("details"):
            assert words(found.find("summary")).startswith("The numbers")
            region = found.find("div[@role='region']")
            assert region.get("tabindex") == "0" and region.get("aria-label") and region.find("table") is not None
        assert part.find(".//details") is not None
    assert root.find(".//html").get("lang") == "en" and root.find(".//title").text == "RotateK: artifact (org/model)"


def test_the_numbers_are_the_artifacts(artifact):
    root = parse(page([artifact]))
    table = tables(section(root, "ranks"))[0]
    assert table[0] == ["layer.head", "Keys", "Values", "Key bits", "Value bits", "bytes per token"]
    assert table[1] == ["0.0", "8×16", "raw", "4", "16", "80"] and table[3:5] == [
        ["1.0", "mean", "raw", "0", "16", "64"],
        ["1.1", "raw", "raw", "16", "16", "128"],
    ]
    said = words(section(root, "ranks"))
    assert "Keys: 88 directions over 6 heads, 7.33 bits per channel; 1 of them keep none. Values: stored as they are." in said
    assert tables(section(root, "knockouts"))[0][3] == ["2", "0.5", "0.03"]
    assert "67% of 6 pairs cost at least 0.02 nats alone" in words(section(root, "knockouts"))
    assert tables(section(root, "cuts"))[0][:3] == [["layer.head", "cut to mean", "cut to 8×16"], ["0.0", "0.4", "0.1"], ["0.1", "0", "0"]]
    assert tables(section(root, "spectra"))[0][1] == ["0.0", "8", "0.996", "4", "7", "10", short(0.5**7 - 0.5**31)]
    assert tables(section(root, "errors"))[0][1:3] == [["0.0", "mean", "2", "0.4"], ["0.1", "mean", "2", "0"]]
    assert tables(section(root, "budgets"))[0][:2] == [["bytes over dense", "predicted KL"], ["100.00%", "0"]]
    assert "This plan takes 73.0% of the bytes" in words(section(root, "budgets"))
    assert "measured 0.25 nats per answer token" in words(section(root, "budgets"))
    assert tables(section(root, "bytes"))[0][1] == ["0", "65536", "65536", "24576", "65536", "0", "128"]


def test_maps_have_a_cell_for_each_head_with_its_value(artifact):
    root = parse(page([artifact]))
    cells = section(root, "ranks").findall(".//g[@class='cells']/path")
    assert [words(c) for c in cells] == [
        f"layer {i}, head {h}: {r}" for i, row in enumerate([[8, 16], [0, 32], [24, 8]]) for h, r in enumerate(row)
    ]
    assert [c.get("fill-opacity") for c in cells] == [".25", ".50", ".00", None, ".75", ".25"]
    found = section(root, "knockouts").findall(".//g[@class='cells']/path")
    assert [c.get("class") for c in found] == ["marked", None, "marked", None, "marked", "marked"]  # 0.5, 0, 0.5, 0.015, 0.5, 0.03
    spectra = section(root, "spectra").findall(".//svg/g")
    assert [[p.get("class") for p in g.findall("path")] for g in spectra[2:4]] == [["floor", "off", "over"], ["floor", "hi", "over"]]


def test_a_spectrum_is_filled_up_to_its_rank(artifact):
    """Of 32 directions 8 are kept: the filled part ends at a quarter of its box."""
    group = section(parse(page([artifact])), "spectra").find(".//svg/g")
    floor, off, hi = (p.get("d") for p in group.findall("path")[:3])
    left, wide = (float(x) for x in re.match(r"M([\d.]+) [\d.]+h([\d.]+)v", floor).groups())
    steps = [float(x.split(" ")[0]) for x in re.findall(r"(-?[\d.]+ -?[\d.]+)", hi.split("l")[1])]
    assert float(re.match(r"M([\d.]+)", hi)[1]) == pytest.approx(left, abs=0.06)
    assert sum(steps) == pytest.approx(wide / 4, abs=0.11)
    assert float(re.match(r"M([\d.]+)", off)[1]) == pytest.approx(left + wide / 4, abs=0.11)


PLAN = [
    [HeadPlan(Slabs(8, 8, 16), Slabs(0, 0, 32)), HeadPlan(Slabs(), Slabs(DIM))],
    [HeadPlan(Slabs(DIM), Slabs())] * 2,
    [HeadPlan(Slabs(0, 16), Slabs(8, 0, 16))] * 2,
]


@pytest.fixture
def coded(make_artifact):
    """Three precisions, Keys and Values."""
    made = make_artifact(plan=PLAN, levels=(Slabs(), Slabs(0, 0, 16)), kv_budget=0.5)
    made.tensors |= {
        f"layers.{i}.{side}_sensitivity": torch.tensor([[0.4, 0.1], [0.2, 0.0]]) for i in range(3) for side in ("key", "value")
    }
    return made


def test_both_sides_and_their_precision(coded):
    root = parse(page([coded]))
    maps = section(root, "ranks").findall(".//svg")
    values = [[words(c).split(": ")[1] for c in svg.findall(".//g[@class='cells']/path")] for svg in maps]
    assert values == [
        ["32", "0", "32", "32", "16", "16"],
        ["8", "0", "16", "16", "4", "4"],
        ["32", "32", "0", "0", "24", "24"],
        ["4", "16", "0", "0", "6", "6"],
    ]
    assert [words(c) for c in section(root, "ranks").iter("figcaption")] == [
        f"{side}: {what}" for side in ("Keys", "Values") for what in ("directions", "bits per channel")
    ]
    keys, values = section(root, "spectra").findall(".//svg")
    assert [[p.get("class") for p in g.findall("path")] for g in keys.findall("g")[:3]] == [
        ["floor", "hi4", "hi8", "hi"], ["floor", "off"], ["floor", "hi"]
    ]  # fmt: skip
    assert words(keys.find("g/title")) == "layer 0, head 0: 8×16 8×8 16×4, 32 of 32 directions"
    assert [p.get("class") for p in values.findall("g")[4].findall("path")] == ["floor", "off", "hi4", "hi"]
    assert [words(c) for c in section(root, "cuts").iter("figcaption")] == [
        "Keys cut to mean", "Keys cut to 16×4", "Values cut to mean", "Values cut to 16×4"
    ]  # fmt: skip
    assert len(section(root, "errors").findall(".//svg")) == 2 and len(tables(section(root, "budgets"))) == 2
    assert tables(section(root, "bytes"))[0][1] == ["0", "65536", "65536", str(512 * 32), str(512 * 80), "112", "192"]


def test_a_plan_beside_another_budget(coded, make_artifact):
    other = make_artifact(plan=[PLAN[0], PLAN[1], [HeadPlan(Slabs(8, 16), Slabs(8, 0, 16)), PLAN[2][1]]])
    root = parse(page([coded, other]))
    maps = root.findall(".//main/section")[1].findall(".//svg")
    found = [[words(c).split(": ")[1] for c in svg.findall(".//g[@class='cells']/path")] for svg in maps]
    assert found == [["0"] * 4 + ["8", "0"], ["0"] * 4 + ["4", "0"], ["0"] * 6, ["0"] * 6]


def test_nothing_comes_from_elsewhere(artifact):
    text = page([artifact])
    root = parse(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|javascript:|data:", text.replace("<!DOCTYPE html>", ""))
    assert not {e.tag for e in root.iter()} & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base", "form"}
    assert not [name for e in root.iter() for name in e.attrib if name.startswith("on") or name in ("src", "href", "style")]
    policy = root.find(".//meta[@http-equiv='Content-Security-Policy']").get("content")
    assert policy.startswith("default-src 'none';") and "script" not in policy


def test_hostile_names_stay_text(artifact, tmp_path):
    artifact.base_model = {"id": HOSTILE, "revision": HOSTILE, "fingerprint": None}
    artifact.calibration = {"data": HOSTILE, "num_samples": HOSTILE, "split": ["\ud800"]}
    artifact.libraries = {HOSTILE: "\x00\x1b[31m" * 500}
    artifact.path = tmp_path / "<i>&amp;"
    text = page([artifact, artifact])
    text.encode("utf-8")
    root = parse(text)
    assert not {e.tag for e in root.iter()} & {"script", "img", "b", "body.b"}
    assert "alert(1)" in words(root.find(".//title")) and "<i>&amp;" in words(root.find(".//h1"))
    assert not re.search("[\x00-\x08\x1b\u202e\ud800]", text)
    assert "\x1b" not in text and len(text) < len(page([artifact])) * 2.5


def test_two_artifacts_side_by_side(artifact, make_artifact, tmp_path):
    other = make_artifact([[16, 16], [0, 24], [24, 8]], levels=(Slabs(),), basis="pca")
    for i in range(3):
        other.tensors[f"layers.{i}.key_sensitivity"] = torch.tensor([[40.0], [0.0]])
        del other.tensors[f"layers.{i}.value_sensitivity"]
    artifact.path, other.path = tmp_path / "one", tmp_path / "two"
    root = parse(page([artifact, other]))
    assert root.find(".//main").get("class") == "pair"
    facts = {words(row[0]): (row.get("class"), [words(c) for c in row[1:]]) for row in root.find(".//header").iter("tr")}
    assert facts["base model"] == ("differs", ["org/model", "unknown"])
    assert facts["architecture"] == (None, ["llava_next"] * 2)
    for name in ("ranks", "cuts", "budgets", "bytes"):
        assert [words(h) for h in section(root, name).iter("h3")] == ["one", "two"]
    change = [words(c) for c in root.findall(".//main/section")[1].findall(".//g[@class='cells']/path")]
    assert "What two keeps more (+) or less (-) of than one." in words(root)
    assert change == [f"layer {i}, head {h}: {d}" for i, row in enumerate([[8, 0], [0, -8], [0, 0]]) for h, d in enumerate(row)]
    assert "compile with --span all" in words(section(root, "angles"))
    # the scale is common: 0.4 of at most 40 nats
    keys = section(root, "cuts").findall(".//ul/li")
    assert len({words(k) for k in keys}) == 1 and "100 nats" in words(keys[0])
    assert "Key energy" in words(section(root, "spectra")) and "expected squared logit error" in words(section(root, "spectra"))


def test_two_models(artifact, make_artifact):
    layers = tuple(LayerGeometry(layer_type="full_attention", query_heads=4, kv_heads=4, head_dim=64) for _ in range(5))
    other = make_artifact(24, shape=Geometry(model_type="other", layers=layers, visual_token_ids=(9,)))
    root = parse(page([artifact, other]))
    assert [len(svg.findall(".//g[@class='cells']/path")) for svg in section(root, "ranks").iter("svg")] == [6, 20]
    assert "Where the two differ" not in words(root)


def test_a_rival_and_an_old_artifact(rival, make_artifact):
    root = parse(page([rival]))
    assert [s.get("id") for s in root.iter("section")] == ["knockouts", "bytes", None]
    assert "rival method head-drop" in words(list(root.iter("section"))[-1])
    root = parse(page([make_artifact(8)]))  # neither knock-outs nor sensitivities nor a report
    assert [s.get("id") for s in root.iter("section")] == ["ranks", "spectra", "variance", "bytes", None]
    missing = words(list(root.iter("section"))[-1])
    assert "Which heads read the images: This artifact is older than knock-outs" in missing
    assert "No sensitivities were measured" in missing and "--span all" in missing
    assert "the whole plan was not measured" not in missing


@pytest.mark.parametrize("ranks", [0, 32])
def test_the_ends_of_a_plan(make_artifact, ranks):
    artifact = make_artifact(ranks, levels=(Slabs(), Slabs(8)))
    for i in range(3):
        artifact.tensors |= {f"layers.{i}.{side}_sensitivity": torch.zeros(2, 2) for side in ("key", "value")}
        artifact.tensors[f"layers.{i}.knockout"] = torch.zeros(2)
        artifact.tensors[f"layers.{i}.visual.key_spectrum"][:] = 0
    root = parse(page([artifact]))
    assert "nan" not in words(root.find(".//body")).lower().split()
    assert not re.search(r'"[^"]*\b(nan|inf)\b[^"]*"', page([artifact]))


def test_numbers_for_coordinates_and_people():
    assert [tenth(x) for x in (0.04, -0.04, -0.5, 0.5, 10.5, -10.0, 1.0, 0.96, 100.04)] == [
        "0",
        "0",
        "-.5",
        ".5",
        "10.5",
        "-10",
        "1",
        "1",
        "100",
    ]
    assert [short(x) for x in (0.0, 0.25, 12345.6, 1e-5, -0.5, 2e7)] == ["0", "0.25", "1.23e+04", "1.0e-05", "-0.5", "2.0e+07"]


def test_writing_replaces_pages_alone(artifact, tmp_path, untouched):
    text, file = page([artifact]), tmp_path / "new" / "page.html"
    write_page(text, file, overwrite=False)
    assert file.read_text(encoding="utf-8") == text and file.stat().st_mode & 0o777 == 0o644
    write_page(text.replace("org/model", "org/other"), file, overwrite=False)
    assert "org/other" in file.read_text(encoding="utf-8")
    file.write_text("<!DOCTYPE html><html>my diary")
    with pytest.raises(RotateKError, match=r"page.html is no page of rotatek-inspect; pass --overwrite"):
        write_page(text, file, overwrite=False)
    assert file.read_text().endswith("my diary")
    write_page(text, file, overwrite=True)
    assert file.read_text(encoding="utf-8") == text
    for target, reason in ((tmp_path, "is a folder"), (file / "x.html", "page.html is a file, not a folder")):
        with pytest.raises(RotateKError, match=reason):
            write_page(text, target, overwrite=True)
    untouched(tmp_path / "new", "page.html")
    link = tmp_path / "link.html"
    link.symlink_to(file)
    write_page(text, link, overwrite=False)
    assert link.is_symlink()


def test_a_failed_write_leaves_the_old_page(artifact, tmp_path, monkeypatch, untouched):
    file = tmp_path / "page.html"
    write_page(page([artifact]), file, overwrite=False)
    before = file.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fdopen", full)
    with pytest.raises(RotateKError, match="could not write .*page.html: No space left on device"):
        write_page("x", file, overwrite=False)
    assert file.read_bytes() == before
    untouched(tmp_path, "page.html")


def test_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RotateKError, match="no regular file"):
        refuse_page(tmp_path / "pipe", overwrite=True)


def test_the_command(cli, compiled, tmp_path, untouched):
    file = tmp_path / "page.html"
    ended = cli("inspect", compiled, "--html", file)
    assert ended.code == 0 and re.fullmatch(rf"wrote {re.escape(str(file))}: \d+ KiB\n", ended.out)
    root = parse(file.read_text(encoding="utf-8"))
    assert {"ranks", "knockouts", "cuts", "spectra", "variance", "errors", "budgets", "bytes"} <= {
        s.get("id") for s in root.iter("section")
    }
    result = json.loads(cli("inspect", compiled, compiled, "--html", file, "--json").out)
    assert result["html"] == str(file) and result["artifact"]["ranks"] == result["other"]["ranks"]
    file.write_text("something else")
    assert "pass --overwrite" in cli("inspect", compiled, "--html", file).sentence()
    assert cli("inspect", compiled, "--html", file, "--overwrite").code == 0
    assert "pass --html FILE" in cli("inspect", compiled, "--overwrite").sentence(2)
    untouched(tmp_path, "page.html")
