//! The web page: the files of `ui/dist`, which the binary embeds.
//!
//! The collector reads no file of the page from disk. The content policy permits the page to talk only to the collector
//! that served it.

use std::{collections::BTreeMap, fmt::Write as _, sync::Arc};

use axum::{
    Router,
    body::Body,
    http::{
        HeaderMap, HeaderValue, StatusCode,
        header::{
            CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY,
            X_CONTENT_TYPE_OPTIONS, X_FRAME_OPTIONS,
        },
    },
    response::{IntoResponse, Response},
    routing::get,
};
use include_dir::{Dir, include_dir};
use sha2::{Digest, Sha256};

static DIST: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/ui/dist");

/// Paths of the page's views, which people bookmark. The page itself reads the path.
const VIEWS: [&str; 3] = ["/", "/nodes", "/rules"];

/// Permits scripts and styles only from files of the page, requests only to its collector, and no frame around it.
const POLICY: &str = "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

/// An embedded file, and the parts of its response that do not depend on the request.
struct PageFile {
    body: &'static [u8],
    content_type: &'static str,
    cache: &'static str,
    etag: HeaderValue,
}

impl PageFile {
    fn new(path: &str, body: &'static [u8]) -> Self {
        let mut etag = String::from("\"");
        for byte in Sha256::digest(body).iter().take(16) {
            // Writing into a string does not fail.
            let _ = write!(etag, "{byte:02x}");
        }
        etag.push('"');
        Self {
            body,
            content_type: content_type(path),
            // The build puts a hash of the content into every name in assets/.
            cache: if path.starts_with("assets/") {
                "public, max-age=31536000, immutable"
            } else {
                "no-cache"
            },
            etag: HeaderValue::from_str(&etag).unwrap_or(HeaderValue::from_static("\"\"")),
        }
    }

    fn respond(&self, request: &HeaderMap) -> Response {
        let known = request
            .get_all(IF_NONE_MATCH)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .map(|tag| tag.trim().trim_start_matches("W/"))
            .any(|tag| tag == "*" || tag.as_bytes() == self.etag.as_bytes());
        let mut response = if known {
            StatusCode::NOT_MODIFIED.into_response()
        } else {
            let mut full = Body::from(self.body).into_response();
            full.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(self.content_type));
            full
        };
        let headers = response.headers_mut();
        headers.insert(ETAG, self.etag.clone());
        for (name, value) in [
            (CACHE_CONTROL, self.cache),
            (CONTENT_SECURITY_POLICY, POLICY),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (X_FRAME_OPTIONS, "DENY"),
            // Selectors in the URL name services and pods. No other site sees them.
            (REFERRER_POLICY, "no-referrer"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        response
    }
}

fn content_type(path: &str) -> &'static str {
    match path.rsplit_once('.').map(|(_, extension)| extension) {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        Some("txt") => "text/plain; charset=utf-8",
        _ => "application/octet-stream",
    }
}

fn collect(dir: &'static Dir<'static>, files: &mut BTreeMap<String, Arc<PageFile>>) {
    for file in dir.files() {
        // URLs have slashes on every system.
        let path = file.path().to_string_lossy().replace('\\', "/");
        files.insert(path.clone(), Arc::new(PageFile::new(&path, file.contents())));
    }
    for inner in dir.dirs() {
        collect(inner, files);
    }
}

/// Returns a route for each embedded file and for each view. It sets no fallback, so an unknown path stays a plain 404
/// in the router that it is merged into.
pub(super) fn router<S>() -> Router<S>
where
    S: Clone + Send + Sync + 'static,
{
    let mut files = BTreeMap::new();
    collect(&DIST, &mut files);
    let mut router = Router::new();
    let serve = |file: Arc<PageFile>| get(move |headers: HeaderMap| async move { file.respond(&headers) });
    if let Some(index) = files.get("index.html") {
        for view in VIEWS {
            router = router.route(view, serve(Arc::clone(index)));
        }
    }
    for (path, file) in files {
        router = router.route(&format!("/{path}"), serve(file));
    }
    router
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::Request;
    use tower::ServiceExt;

    async fn fetch(path: &str, known: Option<&HeaderValue>) -> Response {
        let mut request = Request::builder().uri(path);
        if let Some(etag) = known {
            request = request.header(IF_NONE_MATCH, etag);
        }
        router::<()>().oneshot(request.body(Body::empty()).unwrap()).await.unwrap()
    }

    fn assets() -> Vec<String> {
        let mut files = BTreeMap::new();
        collect(&DIST, &mut files);
        files.into_keys().collect()
    }

    #[tokio::test]
    async fn every_view_is_the_page_under_a_strict_policy() {
        for view in VIEWS {
            let response = fetch(view, None).await;
            assert_eq!(response.status(), StatusCode::OK, "{view}");
            assert_eq!(response.headers()[CONTENT_TYPE], "text/html; charset=utf-8");
            assert_eq!(response.headers()[CACHE_CONTROL], "no-cache");
            let policy = response.headers()[CONTENT_SECURITY_POLICY].to_str().unwrap();
            assert!(policy.starts_with("default-src 'self'"), "{policy}");
            assert!(!policy.contains("unsafe"), "{policy}");
        }
    }

    #[tokio::test]
    async fn a_hashed_asset_is_immutable_and_revalidates() {
        let is_script =
            |path: &String| path.starts_with("assets/") && content_type(path).starts_with("text/javascript");
        let script = assets().into_iter().find(is_script);
        let path = format!("/{}", script.expect("the page has a script"));
        let first = fetch(&path, None).await;
        assert_eq!(first.status(), StatusCode::OK);
        assert_eq!(first.headers()[CONTENT_TYPE], "text/javascript; charset=utf-8");
        assert!(first.headers()[CACHE_CONTROL].to_str().unwrap().contains("immutable"));
        let again = fetch(&path, Some(&first.headers()[ETAG])).await;
        assert_eq!(again.status(), StatusCode::NOT_MODIFIED);
        let other = fetch(&path, Some(&HeaderValue::from_static("\"another\""))).await;
        assert_eq!(other.status(), StatusCode::OK);
    }

    #[tokio::test]
    async fn unknown_paths_are_not_found() {
        for path in ["/assets/none.js", "/../Cargo.toml", "/api/v1/none", "/nodes/x"] {
            assert_eq!(fetch(path, None).await.status(), StatusCode::NOT_FOUND, "{path}");
        }
    }

    #[test]
    fn embedded_files_have_known_types_and_no_build_paths() {
        let mut files = BTreeMap::new();
        collect(&DIST, &mut files);
        for (path, file) in files {
            // A source map, for example, has no known type.
            assert_ne!(file.content_type, "application/octet-stream", "{path}");
            let text = String::from_utf8_lossy(file.body);
            assert!(!text.contains("node_modules/"), "{path} names a path of the machine that built it");
        }
    }

    /// Checks that the committed `ui/dist` was built from the present sources, also on machines without Node.
    #[test]
    fn the_built_page_matches_its_sources() {
        let check = concat!(env!("CARGO_MANIFEST_DIR"), "/ui/sources-hash");
        let output = std::process::Command::new("sh").arg(check).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let built = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/ui/dist.sha256")).unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            built,
            "collector/ui changed and its dist did not: run `npm ci && npm run build` in collector/ui"
        );
    }
}
