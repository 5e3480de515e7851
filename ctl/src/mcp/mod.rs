//! A server of the Model Context Protocol on standard input and output, so that an assistant can read profiles. Its tools only
//! read. Their answers are the texts that gannetctl's own commands print, up to a limit.

mod arguments;
mod tools;

use std::{sync::Arc, time::Duration};

use rmcp::{
    ErrorData, RoleServer, ServerHandler, ServiceExt as _,
    model::{
        CallToolRequestParams, CallToolResponse, CallToolResult, ContentBlock, Implementation,
        ListToolsResult, PaginatedRequestParams, ServerCapabilities, ServerConfig,
    },
    service::RequestContext,
    transport::stdio,
};
use tokio::sync::Semaphore;

use crate::{client::Collector, error::Error};

/// Maximum size of an answer, in bytes. A model reads all of it.
const MAX_ANSWER_BYTES: usize = 64 << 10;
/// Maximum number of calls at one time. Further ones wait.
const MAX_CALLS: usize = 4;
/// Time limit of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// The description of the server for its clients.
const INSTRUCTIONS: &str = "Reads CPU and off-CPU profiles of the programs of a cluster, which Gannet samples. Begin with \
    list_services: it shows which services have profiles, and the labels to select them by. top_functions shows where a \
    service spends its time, flame_graph through which calls it gets there, and diff_functions what has changed between two \
    ranges of time or two selectors. explain_rule says why a rule does or does not profile processes of a node. A selector \
    is written like {service_name=\"checkout\", pod=~\"checkout-.*\"}. No tool changes anything.";

struct Server {
    collector: Arc<Collector>,
    calls: Semaphore,
}

/// Serves the protocol until the client closes standard input.
pub(crate) async fn serve(collector: Collector) -> Result<(), Error> {
    let server = Server { collector: Arc::new(collector), calls: Semaphore::new(MAX_CALLS) };
    let failed = |text: String| Error::Failed(format!("the MCP client: {text}"));
    let running = server.serve(stdio()).await.map_err(|error| failed(error.to_string()))?;
    running.waiting().await.map_err(|error| failed(error.to_string()))?;
    Ok(())
}

impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        ServerConfig::new(ServerCapabilities::builder().enable_tools().build())
            .with_server_info(Implementation::new("gannetctl", env!("CARGO_PKG_VERSION")))
            .with_instructions(INSTRUCTIONS)
    }

    async fn list_tools(
        &self,
        _: Option<PaginatedRequestParams>,
        _: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        Ok(ListToolsResult::with_all_items(tools::all().iter().map(tools::Declared::tool).collect()))
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        _: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        let Some(tool) = tools::all().iter().find(|tool| tool.name == request.name) else {
            let names: Vec<_> = tools::all().iter().map(|tool| tool.name).collect();
            let text =
                format!("there is no tool {}; there are {}", request.name.escape_debug(), names.join(", "));
            return Err(ErrorData::invalid_params(text, None));
        };
        // The semaphore is never closed.
        let _permit = self.calls.acquire().await.ok();
        let call = tool.call(request.arguments.unwrap_or_default(), &self.collector);
        let answer = tokio::time::timeout(CALL_TIMEOUT, call).await.unwrap_or_else(|_| {
            let seconds = CALL_TIMEOUT.as_secs();
            Err(format!(
                "the collector did not answer within {seconds} s; select fewer profiles with query or since"
            ))
        });
        let result = match answer {
            Ok(text) => CallToolResult::success(vec![ContentBlock::text(cut(text, tool.cure))]),
            Err(text) => CallToolResult::error(vec![ContentBlock::text(cut(text, ""))]),
        };
        Ok(result.into())
    }
}

/// Cuts an answer that is too long after a line, and adds the advice how to get a shorter one.
fn cut(mut text: String, cure: &str) -> String {
    if text.len() <= MAX_ANSWER_BYTES {
        return text;
    }
    let beginning = gannet_base::head(&text, MAX_ANSWER_BYTES);
    let end = beginning.rfind('\n').map_or(beginning.len(), |at| at + 1);
    text.truncate(end);
    text + "[the answer is longer than "
        + &(MAX_ANSWER_BYTES >> 10).to_string()
        + " KiB and ends here"
        + cure
        + "]\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_answer_ends_behind_a_line_with_its_cure() {
        let text = "a line with ümlauts\n".repeat(10_000);
        let shown = cut(text.clone(), "; give a smaller limit");
        assert!(shown.len() < MAX_ANSWER_BYTES + 200);
        let (lines, note) = shown.rsplit_once("\n[").unwrap();
        assert!(lines.ends_with("ümlauts") && note.contains("64 KiB") && note.contains("smaller limit"));
        assert_eq!(cut("short".to_owned(), ""), "short");
    }
}
