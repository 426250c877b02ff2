"""Tools (function calling): what a request offers, how a model is told, and how its calls are read back.

types       Function, Toolset, ToolCall
dialects    how model families write calls, and which one a chat template asks for
prompting   tools for models whose template knows none
constrain   a grammar that holds the answer to calls (tool_choice required or named)
reading     the incremental parser of an answer's text
"""

from modules.tools.types import Function, ToolCall, Toolset

__all__ = ["Function", "ToolCall", "Toolset"]
