//! Sends a request again if its connection is silent, as one is that a firewall has forgotten.
//!
//! Each try may be silent for less time than the server allows, and is a sign of life itself. So
//! there is time for another one, and after the last one to look what was done.

use super::super::patience::{SignsOfLife, wait};
use super::super::{Result, StoreError};
use super::metrics::record_no_answer;
use std::time::Duration;
use tokio::time::Instant;

/// How often a request is sent.
pub const TRIES: u32 = 3;

/// How a request was answered.
enum Sent<T> {
    /// The first time that it was sent.
    AtOnce(Result<T>),
    /// After a try without an answer, which the store may carry out or not.
    Later(Result<T>),
    Never,
}

/// Sends a request that changes nothing. `operation` is what S3 calls it.
pub async fn look_until_answered<T, F>(operation: &'static str, send: impl Fn() -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    match send_until_answered(operation, Duration::ZERO, send).await {
        Sent::AtOnce(answer) | Sent::Later(answer) => answer,
        Sent::Never => Err(StoreError::Other(no_answer(operation))),
    }
}

/// Sends a request that can be repeated. Errors: `Unknown` if it may have been carried out.
/// `in_advance` is what the store is given before its first sign of life.
pub async fn change_until_answered<T, F>(
    operation: &'static str,
    in_advance: Duration,
    send: impl Fn() -> F,
) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    match send_until_answered(operation, in_advance, send).await {
        Sent::AtOnce(answer) | Sent::Later(answer @ Ok(_)) => answer,
        Sent::Later(Err(refusal)) => Err(as_doubt(refusal)),
        Sent::Never => Err(StoreError::Unknown(no_answer(operation))),
    }
}

/// Sends a request once. `None` if it is silent for too long.
pub async fn send_once<T>(
    operation: &'static str,
    in_advance: Duration,
    request: impl Future<Output = T>,
) -> Option<T> {
    let began = Instant::now();
    let signs = SignsOfLife::current();
    signs.give();
    let answered = wait(request, max_silence(&signs), in_advance).await;
    if answered.is_none() {
        // The SDK does not notice that its request is dropped.
        record_no_answer(operation, began.elapsed());
    }
    answered
}

/// How long one try may be silent: two thirds of what the server allows.
pub fn max_silence(signs: &SignsOfLife) -> Duration {
    signs.timeout() / 3 * 2
}

async fn send_until_answered<T, F>(
    operation: &'static str,
    in_advance: Duration,
    send: impl Fn() -> F,
) -> Sent<T>
where
    F: Future<Output = Result<T>>,
{
    for number in 1..=TRIES {
        match send_once(operation, in_advance, send()).await {
            Some(answer) if number == 1 => return Sent::AtOnce(answer),
            Some(answer) => return Sent::Later(answer),
            None => {}
        }
    }
    Sent::Never
}

/// A refusal after a silent try: it may be due to what that try has done, or is still doing.
pub fn as_doubt(refusal: StoreError) -> StoreError {
    match refusal {
        StoreError::Precondition | StoreError::Unknown(_) => refusal,
        other => StoreError::Unknown(other.to_string()),
    }
}

/// Why a request has failed whose tries were all silent.
pub fn no_answer(operation: &str) -> String {
    let last_failure = SignsOfLife::current().describe_last_failure();
    format!("the store did not answer {operation}, which was sent {TRIES} times{last_failure}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::future::pending;

    /// How the server waits.
    const TIMEOUT: Duration = Duration::from_secs(30);

    /// Sends a request that is silent for this many tries, then answered. Also returns how often it
    /// was sent.
    async fn send_after(silent: u32, answer: Result<()>) -> (Option<Result<()>>, u32) {
        let sent = Cell::new(0);
        let send = || async {
            sent.set(sent.get() + 1);
            match sent.get() > silent {
                true => answer.clone(),
                false => pending().await,
            }
        };
        let request = change_until_answered("PutObject", Duration::ZERO, send);
        let answered = wait(request, TIMEOUT, Duration::ZERO).await;
        (answered, sent.get())
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_try_is_followed_by_another() {
        let forbidden = || StoreError::Forbidden("no".to_owned());
        let refuse = send_after(0, Err(forbidden())).await;
        assert_eq!(refuse, (Some(Err(forbidden())), 1));
        let in_doubt = StoreError::Unknown(forbidden().to_string());
        let refused = send_after(1, Err(forbidden())).await;
        assert_eq!(refused, (Some(Err(in_doubt)), 2));
        let precondition = send_after(1, Err(StoreError::Precondition)).await;
        assert_eq!(precondition, (Some(Err(StoreError::Precondition)), 2));
        assert_eq!(send_after(2, Ok(())).await, (Some(Ok(())), 3));
        let never = StoreError::Unknown(no_answer("PutObject"));
        assert_eq!(send_after(3, Ok(())).await, (Some(Err(never)), 3));
    }
}
