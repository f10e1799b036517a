//! Microversions: what a client asks for, and what it gets.
//!
//! Source: OpenStack API-SIG "Microversion Specification"; nova's older header besides.

use std::fmt;

use http::{HeaderMap, StatusCode};

use crate::http::{ApiError, Service};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Microversion {
    major: u16,
    minor: u16,
}

impl Microversion {
    pub const fn new(major: u16, minor: u16) -> Self {
        Self { major, minor }
    }

    pub fn at_least(self, major: u16, minor: u16) -> bool {
        self >= Self::new(major, minor)
    }

    /// Whether it lies in `from..=to`, the way a schema or a field is valid in nova.
    pub fn within(self, from: (u16, u16), to: (u16, u16)) -> bool {
        self >= Self::new(from.0, from.1) && self <= Self::new(to.0, to.1)
    }

    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once('.')?;
        let plain = |digits: &str| {
            !digits.is_empty()
                && digits.bytes().all(|byte| byte.is_ascii_digit())
                && (digits == "0" || !digits.starts_with('0'))
        };
        (plain(major) && plain(minor))
            .then(|| Some(Self::new(major.parse().ok()?, minor.parse().ok()?)))?
    }
}

impl fmt::Display for Microversion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// A version that cannot be served: what to answer, and the version to echo in the headers.
pub(super) struct Unserved {
    pub error: ApiError,
    pub echo: Option<Microversion>,
}

/// The microversion of a request; `None` for services that have none.
pub(super) fn negotiate(
    service: Service,
    headers: &HeaderMap,
) -> Result<Option<Microversion>, Unserved> {
    let Some((lowest, highest)) = service.microversions() else {
        return Ok(None);
    };
    let Some(asked) = asked(service, headers) else {
        return Ok(Some(lowest));
    };
    if asked == "latest" {
        return Ok(Some(highest));
    }
    let Some(version) = Microversion::parse(&asked) else {
        let error = ApiError::bad_request(format!(
            "API Version String {asked} is of invalid format. Must be of format \
             MajorNum.MinorNum."
        ));
        return Err(Unserved { error, echo: None });
    };
    if version < lowest || version > highest {
        let error = ApiError::of_kind(
            StatusCode::NOT_ACCEPTABLE,
            "computeFault",
            format!(
                "Version {version} is not supported by the API. Minimum is {lowest} and maximum \
                 is {highest}."
            ),
        );
        return Err(Unserved {
            error,
            echo: Some(version),
        });
    }
    Ok(Some(version))
}

/// The value of `OpenStack-API-Version` for this service (`compute 2.37`, one of a list), else of
/// nova's own header.
fn asked(service: Service, headers: &HeaderMap) -> Option<String> {
    let kind = match service {
        Service::Volume => "volume",
        other => other.catalog().0,
    };
    let modern = headers
        .get_all("openstack-api-version")
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|entry| entry.trim().split_once(char::is_whitespace))
        .filter(|(name, _)| name.eq_ignore_ascii_case(kind))
        .map(|(_, version)| version.trim().to_ascii_lowercase())
        .next_back();
    modern.or_else(|| {
        let older = headers
            .get("x-openstack-nova-api-version")
            .filter(|_| service == Service::Compute)?;
        Some(older.to_str().ok()?.trim().to_ascii_lowercase())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(pairs: &[(&'static str, &str)]) -> Result<Option<Microversion>, Unserved> {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        negotiate(Service::Compute, &headers)
    }

    #[test]
    fn no_header_means_the_lowest() {
        assert_eq!(ask(&[]).ok().unwrap(), Some(Microversion::new(2, 1)));
    }

    #[test]
    fn the_modern_header_wins_over_novas_own() {
        let version = ask(&[
            ("x-openstack-nova-api-version", "2.5"),
            ("openstack-api-version", "volume 3.71, compute 2.37"),
        ]);
        assert_eq!(version.ok().unwrap(), Some(Microversion::new(2, 37)));
    }

    #[test]
    fn latest_is_the_highest() {
        let version = ask(&[("openstack-api-version", "compute latest")]);
        assert_eq!(version.ok().unwrap(), Some(Microversion::new(2, 96)));
    }

    #[test]
    fn versions_beyond_are_406_and_junk_is_400() {
        let beyond = ask(&[("x-openstack-nova-api-version", "2.97")])
            .err()
            .unwrap();
        assert_eq!(beyond.error.status(), StatusCode::NOT_ACCEPTABLE);
        assert_eq!(beyond.echo, Some(Microversion::new(2, 97)));
        for junk in ["junk", "2", "2.", "2.01", "2.1.1", "-2.1", "2.99999999"] {
            let answer = ask(&[("openstack-api-version", &format!("compute {junk}"))])
                .err()
                .unwrap();
            assert_eq!(answer.error.status(), StatusCode::BAD_REQUEST, "{junk}");
        }
    }
}
