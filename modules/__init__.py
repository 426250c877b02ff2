"""Switchyard: every local LLM backend behind one generate interface. See README-dev.md for the map."""
