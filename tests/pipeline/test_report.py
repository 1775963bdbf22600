import dataclasses
import html.parser
import json
import xml.etree.ElementTree as ET

import pytest
from rich.console import Console

from fxopt.errors import InputError, LoadError, SaveError
from fxopt.ir.program import PassRecord, Refusal, Site
from fxopt.pipeline.report import LoweredSite, Report, dump_json, machine


def make_report() -> Report:
    return Report(
        model="tiny <b>",
        model_class="TinyModel",
        dtype="float32",
        recipe={"name": "w8a8|x", "passes": ["quantize"]},
        history=[
            PassRecord(
                "canonicalize",
                {},
                (Site("layer.0.norm", "RaiseRmsNorm", "mul_3"),),
                verification={"mode": "full", "error_float64": 3e-16, "error_own_dtype": 1e-7},
                bytes_before=1000,
                bytes_after=1000,
                seconds=1.0,
            ),
            PassRecord(
                "quantize",
                {"alpha": 0.5},
                (Site("layer.0.up", "int8 weight"), Site("layer.1.up", "int8 weight")),
                (
                    Refusal("layer.0.down [linear_3]", "the weight is not constant"),
                    Refusal("layer.1.down [linear_7]", "the weight is not constant"),
                ),
                exactness="approximate",
                verification={
                    "mode": "full",
                    "sqnr_db": 31.25,
                    "relative_error": 0.03,
                    "worst_output": "logits",
                    "kl": 0.001,
                    "top1": 0.99,
                    "outputs": {"logits": 31.25, "hidden": None},
                    "layers": {"layer.0.up": 40.0, "layer.1.up": None},
                },
                bytes_before=1000,
                bytes_after=260,
                seconds=2.0,
            ),
        ],
        bytes_before=1000,
        bytes_after=260,
        seconds=3.5,
        target="cpu",
        notes=["captured & checked"],
        lowering=[
            LoweredSite("layer.0.up", "DynamicLinear", True, 100.0, 30.0),
            LoweredSite(
                "layer.1.up", "", False, reason="slower than what it replaces: 1 against 2"
            ),
        ],
        modules=["embed", "layer.0.norm", "layer.0.up", "layer.0.down", "layer.1.up"],
        versions={"torch": "2"},
        machine={"cpu": "a CPU", "flags": ["avx2"], "threads": 2, "gpu": None},
    )


def test_round_trip_as_json():
    report = make_report()
    data = json.loads(json.dumps(report.to_dict()))
    assert Report.from_dict(data) == report


@pytest.mark.parametrize("change", [{"history": None}, {"surprise": 1}, {"lowering": [{"x": 1}]}])
def test_what_is_no_report_is_refused(change):
    data = {**make_report().to_dict(), **change}
    with pytest.raises(LoadError, match="not a report"):
        Report.from_dict(data)


def test_errors_by_output_and_refusals_by_reason():
    report = make_report()
    rows = [(e.pass_name, e.output, e.sqnr_db, e.relative_error, e.top1) for e in report.errors()]
    assert rows == [
        ("quantize", "logits", 31.25, 0.03, 0.99),
        ("quantize", "hidden", None, None, None),
    ]
    assert report.layer_decibels() == {"quantize": {"layer.0.up": 40.0}}
    assert report.refusals() == {
        ("quantize", "the weight is not constant"): 2,
        ("lower", "slower than what it replaces"): 1,
    }


def test_explain_tells_what_happened_to_one_module():
    assert make_report().explain("layer.0.up").splitlines() == [
        "layer.0.up",
        "  canonicalize (equivalent)",
        "    nothing changed here",
        "  quantize (approximate)",
        "    int8 weight",
        "    40.0 dB after this pass",
        "  lower to cpu",
        "    DynamicLinear, 100 -> 30 us",
    ]


def test_explain_looks_into_a_module():
    lines = make_report().explain("layer.0")
    assert "layer.0.norm: RaiseRmsNorm" in lines
    assert "layer.0.down: left as it is: the weight is not constant" in lines
    assert "layer.1" not in lines
    assert "layer.1.up: kept as it is: slower" in make_report().explain("layer.1")
    assert "nothing changed here" in make_report().explain("embed")


def test_explain_names_the_nearest_module():
    with pytest.raises(InputError, match=r"no module 'layer.0.uq'. Did you mean 'layer.0.up'"):
        make_report().explain("layer.0.uq")
    with pytest.raises(InputError, match=r"no module 'layer\.00'"):
        make_report().explain("layer.00")


def test_markdown_says_everything():
    text = make_report().to_markdown()
    for part in (
        "# fxopt report: tiny <b>",
        "| recipe | w8a8\\|x |",
        "1,000 -> 260 bytes (0.260x)",
        "| quantize | 2 | 2 | 31.2 dB | 260 | 2.0 |",
        "| canonicalize | 1 | 0 | equal, error 3e-16 in float64 |",
        "| quantize | the weight is not constant | 2 |",
        "| quantize | logits | 31.2 | 0.03 | 0.001 | 0.990 |",
        "| quantize | hidden | no change |",
        "| layer.0.up | 40.0 |",
        "| DynamicLinear | 1 | 0 | 100 | 30 |",
        "- captured & checked",
    ):
        assert part in text, part
    widths = {
        line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("| q")
    }
    assert widths <= {3, 4, 7}


class Reader(html.parser.HTMLParser):
    VOID = {"meta"}

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.text, self.links = [], [], "", []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_is_one_file_with_plots(tmp_path):
    make_report().to_html(tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert not reader.links
    assert reader.tags.count("svg") == 2
    assert "script" not in reader.tags
    assert "tiny <b>" in reader.text
    assert "tiny &lt;b&gt;" in text
    assert "the weight is not constant" in reader.text
    figure = ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    lengths = [float(bar.get("width")) for bar in figure.iter("rect")]
    assert lengths[0] == lengths[1] > lengths[2] > 0


def test_html_into_nowhere_is_a_clean_error(tmp_path):
    with pytest.raises(SaveError, match="cannot be written"):
        make_report().to_html(tmp_path / "missing" / "r.html")


def test_an_empty_report_prints(tmp_path):
    report = Report("m", "M", "float32", {})
    report.to_html(tmp_path / "r.html")
    assert "# fxopt report: m" in str(report)
    assert report.explain("") == "(model)"


def test_the_terminal_form():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(make_report())
    text = console.export_text()
    assert "canonicalize" in text
    assert "lower to cpu" in text
    assert "quantize left 2 as they were: the weight is not constant" in text


def test_json_for_machines_is_strict():
    assert json.loads(dump_json({"a": [float("inf"), (1, float("nan"))], 2: None})) == {
        "a": ["inf", [1, "nan"]],
        "2": None,
    }


def test_machine_is_plain_data():
    facts = machine()
    assert facts["threads"] >= 1
    assert json.dumps(facts)


@pytest.mark.parametrize(
    ("came_by", "text"),
    [
        (["", ""], None),
        (["read", ""], "read once, by canonicalize"),
        (["read", "carried over"], "read once, by canonicalize; carried over to quantize"),
        (["read", "read"], "read 2 times, by canonicalize, quantize"),
    ],
)
def test_it_says_how_often_calibration_data_was_read(came_by, text):
    report = make_report()
    report.history = [
        dataclasses.replace(record, calibration=how)
        for record, how in zip(report.history, came_by, strict=True)
    ]
    found = report.to_markdown()
    assert (f"| calibration data | {text} |" in found) == (text is not None)
    assert ("calibration data" in found) == (text is not None)
    again = [PassRecord.from_dict(record.to_dict()).calibration for record in report.history]
    assert again == came_by
