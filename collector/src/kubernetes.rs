//! The client of the Kubernetes API.

use std::path::{Path, PathBuf};

use axum::http::{HeaderValue, Request, header};
use kube::{
    Client, Config,
    client::{Body, ClientBuilder},
    config::{KubeConfigOptions, Kubeconfig},
};
use tower::util::MapRequestLayer;

/// Why the collector cannot use the Kubernetes API.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesError {
    /// The kubeconfig file cannot be used.
    #[error("--kubeconfig {path}: {reason}")]
    Kubeconfig {
        /// Path of the file.
        path: PathBuf,
        /// Reason why it cannot be used.
        reason: String,
    },
    /// The collector found neither a service account nor a kubeconfig file.
    #[error(
        "cannot find the Kubernetes API: run as a pod with a service account, or give --kubeconfig FILE ({0})"
    )]
    Unknown(String),
    /// The client cannot be built.
    #[error("cannot use the Kubernetes API: {0}")]
    Client(String),
}

/// Returns a client of the cluster that the kubeconfig file names. Without a file it is the cluster of the collector's
/// pod, or the current context of `kubectl`.
pub(crate) async fn client(kubeconfig: Option<&Path>) -> Result<Client, KubernetesError> {
    let mut config = match kubeconfig {
        None => Config::infer().await.map_err(|error| KubernetesError::Unknown(error.to_string()))?,
        Some(path) => {
            let wrong = |reason: String| KubernetesError::Kubeconfig { path: path.to_owned(), reason };
            let file = Kubeconfig::read_from(path).map_err(|error| wrong(error.to_string()))?;
            Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .map_err(|error| wrong(error.to_string()))?
        }
    };
    // kube keeps a token for up to 50 s after its file has another. A token that runs out would fail every request until then.
    let token_file = config.auth_info.token_file.take().map(PathBuf::from);
    let builder =
        ClientBuilder::try_from(config).map_err(|error| KubernetesError::Client(error.to_string()))?;
    Ok(match token_file {
        None => builder.build(),
        Some(file) => {
            builder.with_layer(&MapRequestLayer::new(move |request| authorize(request, &file))).build()
        }
    })
}

/// Adds the token that the file has now. Without a readable token the API server answers 401, which names the cause.
fn authorize(mut request: Request<Body>, token_file: &Path) -> Request<Body> {
    let token = std::fs::read_to_string(token_file)
        .inspect_err(|error| tracing::warn!("cannot read the token {}: {error}", token_file.display()))
        .ok()
        .and_then(|token| HeaderValue::try_from(format!("Bearer {}", token.trim())).ok());
    if let Some(mut token) = token {
        token.set_sensitive(true);
        request.headers_mut().insert(header::AUTHORIZATION, token);
    }
    request
}
