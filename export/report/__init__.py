"""Report what an export made and measured: report.json, terminal, HTML, JUnit."""
