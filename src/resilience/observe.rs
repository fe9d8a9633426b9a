//! `[runtime] observe`: a policy decides, is counted and logged, and does not act.

/// What follows from a decision. A refusal is always noted, once; while `observing` the request goes on without what
/// it would have been given (a permit, a place), so that nothing has to be given back for it.
///
/// ```
/// use outrigger::resilience::observe::enforce;
///
/// let mut refused = 0;
/// let full: Result<&str, &str> = Err("limit_full");
/// assert_eq!(enforce(full, true, |_| refused += 1), Ok(None));
/// assert_eq!(enforce(full, false, |_| refused += 1), Err("limit_full"));
/// assert_eq!(enforce(Ok::<_, &str>("place"), true, |_| refused += 1), Ok(Some("place")));
/// assert_eq!(refused, 2);
/// ```
pub fn enforce<T, E>(decision: Result<T, E>, observing: bool, note: impl FnOnce(&E)) -> Result<Option<T>, E> {
    match decision {
        Ok(given) => Ok(Some(given)),
        Err(refusal) => {
            note(&refusal);
            if observing { Ok(None) } else { Err(refusal) }
        }
    }
}
