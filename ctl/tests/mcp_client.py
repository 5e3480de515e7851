"""Reads profiles as an assistant does, with the client of the Model Context Protocol's own library: mcp_client.py GANNETCTL SERVICE FUNCTION

The collector, which $GANNET_ENDPOINT names, must have profiles of the service in which the function uses most of the time.
"""

import asyncio
import os
import sys

import jsonschema
from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

TOOLS = ["list_services", "top_functions", "diff_functions", "flame_graph", "explain_rule"]


async def call(session, tool, **arguments):
    """Returns the text of a tool's answer. Fails if it is an error."""
    result = await session.call_tool(tool, arguments)
    text = "".join(block.text for block in result.content)
    assert not result.is_error, f"{tool}: {text}"
    return text


async def check(program, service, function):
    server = StdioServerParameters(command=program, args=["mcp"], env=dict(os.environ))
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        opened = await session.initialize()
        assert opened.server_info.name == "gannetctl" and "list_services" in opened.instructions, opened
        tools = (await session.list_tools()).tools
        assert [tool.name for tool in tools] == TOOLS, tools
        for tool in tools:
            jsonschema.Draft202012Validator.check_schema(tool.input_schema)
            assert tool.annotations.read_only_hint and len(tool.description) > 50, tool
        schema = {tool.name: tool.input_schema for tool in tools}["top_functions"]
        query = '{comm="' + service + '"}'
        arguments = {"query": query, "since": "15m", "limit": 5}
        jsonschema.validate(arguments, schema)

        assert service in await call(session, "list_services", since="15m")
        top = await call(session, "top_functions", **arguments)
        assert function in top.splitlines()[2], top
        flame = await call(session, "flame_graph", query=query, min_percent=5)
        assert function in flame and "main.main" in flame, flame
        diff = await call(session, "diff_functions", query=query, base_query=query)
        assert "+0.00" in diff and function in diff, diff

        for tool, wrong, cure in (
            ("top_functions", {"limit": 5000}, "limit: give a number from 1 to 200"),
            ("top_functions", {"query": "{comm"}, "query"),
            ("explain_rule", {"rule": "pgo", "node": "other"}, "it knows tools"),
        ):
            result = await session.call_tool(tool, wrong)
            assert result.is_error and cure in result.content[0].text, result


asyncio.run(check(*sys.argv[1:]))
