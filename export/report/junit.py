"""Write a report as a JUnit file, which CI servers read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from adaattn.command_line import printable


def junit_xml(report: Mapping[str, Any]) -> bytes:
    """Return the report as JUnit XML, with control characters, which XML forbids, as escapes."""
    root = ElementTree.Element("testsuites", name="adaattn-parity")
    for target in report["targets"]:
        suite = ElementTree.SubElement(root, "testsuite", name=printable(target["name"]))
        rows = target["outputs"] or [{"case": "all", **target, "name": "run"}]
        for row in rows:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=printable(f"{target['name']}.{row['case']}"),
                name=printable(row["name"]),
            )
            tag = {"failed": "failure", "not run": "skipped"}.get(row["verdict"])
            if tag:
                ElementTree.SubElement(case, tag, message=printable(row["reason"] or target["reason"] or ""))
        for key, verdict in (("tests", None), ("failures", "failed"), ("skipped", "not run")):
            suite.set(key, str(sum(verdict is None or row["verdict"] == verdict for row in rows)))
    if report["verdict"] == "failed" and all(target["verdict"] != "failed" for target in report["targets"]):
        suite = ElementTree.SubElement(root, "testsuite", name="verdict", tests="1", failures="1")
        case = ElementTree.SubElement(suite, "testcase", classname="verdict", name="some backend ran")
        ElementTree.SubElement(case, "failure", message="no backend could run the artifacts")
    content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return content
