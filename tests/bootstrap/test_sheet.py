"""The page to review: texts are text, the most doubtful stand first, nothing is fetched."""

import re
from html.parser import HTMLParser

import pytest

from interlace.bootstrap import Decision, bootstrap
from interlace.bootstrap.bootstrap import Report, doubt
from interlace.bootstrap.sheet import write_sheet
from tests.bootstrap.conftest import read_lines

EVIL = "<script>alert(1)</script> & \"quotes\" 'too' <img src=http://example.com/x onerror=y>"


@pytest.fixture
def page(noisy, tmp_path):
    line = {"row": 0, "id": EVIL, "verdict": "keep", "web": EVIL, "synthetic": "", "match_web": 0.61,
            "match_synthetic": None, "cosine_web": 0.2, "cosine_synthetic": None}  # fmt: skip
    noisy.name = EVIL
    report = Report(tmp_path, {"threshold": 0.5, "by": "match", "from": EVIL}, {"keep": 1, "replace": 0, "drop": 0,
                    "bad": 0}, 0, 0, 1, 0, 0, {"web": 1.0, "synthetic": 0.0}, "a", "b")  # fmt: skip
    write_sheet(tmp_path / "review.html", noisy, [line], report)
    return (tmp_path / "review.html").read_text()


def test_texts_are_text(page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;quotes&quot;" in page
    tags = re.findall(r"<(\w+)", page)
    assert "script" not in tags and tags.count("img") == 1 and "onerror=y>" not in page


def test_nothing_is_fetched(page):
    assert "default-src 'none'" in page
    addresses = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            loading = ("src", "href", "srcset", "action", "background")
            addresses.extend(value for name, value in attrs if name in loading)

    Reader().feed(page)
    assert len(addresses) == 1 and addresses[0].startswith("data:image/jpeg;base64,")
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_the_most_doubtful_come_first_and_no_more_than_asked_for(pretrained, noisy, middle, tmp_path):
    report = bootstrap(pretrained, noisy, tmp_path / "clean", decision=Decision(threshold=middle, sheet=10), batch=16,
                       progress=False)  # fmt: skip
    lines = [line for line in read_lines(report.folder / "lineage.jsonl") if "match_web" in line]
    page = (report.folder / "review.html").read_text()
    shown = re.findall(r"</b><span>([^<]+)</span></h2>", page)
    expected = [line["id"] for line in sorted(lines, key=lambda one: doubt(one, "match", middle))][:10]  # stable
    assert shown == expected and "10 most doubtful of 48" in page
    for verdict, word in (("keep", "kept"), ("replace", "replaced"), ("drop", "dropped")):
        assert f"{word} {report.verdicts[verdict]}</label>" in page
