//! Tokens of service accounts, which the Kubernetes API reviews.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, UserInfo};
use kube::{Api, Client, api::PostParams};
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};

/// Lifetime of a remembered confirmation. The collector refuses a revoked token after this time at the latest.
const CONFIRMED_TTL: Duration = Duration::from_secs(60);
/// Lifetime of a remembered refusal.
const REFUSED_TTL: Duration = Duration::from_secs(10);
/// Tokens whose reviews the collector remembers.
const MAX_REVIEWS: usize = 16_384;
const REVIEW_TIMEOUT: Duration = Duration::from_secs(10);
/// Key under which the API names the node of the token's pod.
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";

/// Why a token is not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ReviewError {
    /// The API refuses the token.
    #[error("the token is not valid here: {0}; is its audience the collector's --token-audience?")]
    Refused(String),
    /// The API gives no answer.
    #[error("cannot ask the Kubernetes API about a token: {0}; may the collector create tokenreviews?")]
    Unreachable(String),
}

/// The identity behind a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ReviewedToken {
    pub(crate) name: String,
    pub(crate) groups: Vec<String>,
    /// Node of the pod that the token is bound to. Kubernetes reports it from version 1.30 on.
    pub(crate) node: Option<String>,
}

/// The result of a review, and the time until which it is valid.
type Remembered = (Instant, Result<ReviewedToken, ReviewError>);

/// Asks the Kubernetes API about tokens, and remembers its answers for a short time.
pub(crate) struct Reviewer {
    api: Api<TokenReview>,
    audience: String,
    /// By the SHA-256 of the token, so that the memory holds no token.
    reviews: Mutex<HashMap<[u8; 32], Remembered>>,
}

impl Reviewer {
    pub(crate) fn new(client: Client, audience: String) -> Self {
        Self { api: Api::all(client), audience, reviews: Mutex::default() }
    }

    /// Returns the identity behind a token.
    pub(crate) async fn review(&self, token: &str) -> Result<ReviewedToken, ReviewError> {
        let hash: [u8; 32] = Sha256::digest(token.as_bytes()).into();
        if let Some((until, answer)) = self.reviews.lock().get(&hash)
            && *until > Instant::now()
        {
            return answer.clone();
        }
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.to_owned()),
                audiences: Some(vec![self.audience.clone()]),
            },
            ..TokenReview::default()
        };
        let params = PostParams::default();
        let reviewed = tokio::time::timeout(REVIEW_TIMEOUT, self.api.create(&params, &review)).await;
        let status = match reviewed {
            Err(_) => {
                return Err(ReviewError::Unreachable(format!(
                    "no answer within {} s",
                    REVIEW_TIMEOUT.as_secs()
                )));
            }
            Ok(Err(error)) => return Err(ReviewError::Unreachable(error.to_string())),
            Ok(Ok(review)) => review.status.unwrap_or_default(),
        };
        // An API server without audiences returns none, and would confirm the token of any other service.
        let has_audience = status.audiences.as_ref().is_some_and(|them| them.contains(&self.audience));
        let answer = match (status.authenticated, status.user) {
            (Some(true), Some(user)) if has_audience => Ok(identity(user)),
            (Some(true), _) => {
                Err(ReviewError::Refused(format!("it is not for the audience {}", self.audience)))
            }
            _ => {
                let reason = status.error.unwrap_or_else(|| "it is not known, or has expired".to_owned());
                Err(ReviewError::Refused(reason))
            }
        };
        self.remember(hash, answer.clone());
        answer
    }

    fn remember(&self, hash: [u8; 32], answer: Result<ReviewedToken, ReviewError>) {
        let now = Instant::now();
        let until = now + if answer.is_ok() { CONFIRMED_TTL } else { REFUSED_TTL };
        let mut reviews = self.reviews.lock();
        if reviews.len() >= MAX_REVIEWS {
            reviews.retain(|_, (until, _)| *until > now);
            if reviews.len() >= MAX_REVIEWS {
                reviews.clear();
            }
        }
        reviews.insert(hash, (until, answer));
    }
}

fn identity(user: UserInfo) -> ReviewedToken {
    let UserInfo { username, groups, extra, uid: _ } = user;
    ReviewedToken {
        name: username.unwrap_or_default(),
        groups: groups.unwrap_or_default(),
        node: extra.and_then(|mut extra| extra.remove(NODE_NAME)?.into_iter().next()),
    }
}
