//! The services of the public API, and where they are.

use crate::http::Microversion;

/// A service of the public API. What it is decides the form of errors and of versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Service {
    Identity,
    Image,
    Compute,
    Volume,
    Network,
    /// What no OpenStack service has: hosts.
    Fractus,
}

impl Service {
    pub const ALL: [Self; 6] = [
        Self::Identity,
        Self::Image,
        Self::Compute,
        Self::Volume,
        Self::Network,
        Self::Fractus,
    ];

    /// First segment of the service's paths, without a slash.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Identity => "identity",
            Self::Image => "image",
            Self::Compute => "compute",
            Self::Volume => "volume",
            Self::Network => "network",
            Self::Fractus => "fractus",
        }
    }

    /// Type and name in the catalogue.
    pub fn catalog(self) -> (&'static str, &'static str) {
        match self {
            Self::Identity => ("identity", "keystone"),
            Self::Image => ("image", "glance"),
            Self::Compute => ("compute", "nova"),
            Self::Volume => ("block-storage", "cinder"),
            Self::Network => ("network", "neutron"),
            Self::Fractus => ("fractus", "fractus"),
        }
    }

    /// What follows the prefix in a catalogue entry.
    pub fn catalog_path(self) -> &'static str {
        match self {
            Self::Identity => "/v3",
            Self::Compute => "/v2.1",
            Self::Volume => "/v3",
            Self::Fractus => "/v1",
            Self::Image | Self::Network => "",
        }
    }

    /// Lowest and highest microversion announced, of services that have them.
    pub fn microversions(self) -> Option<(Microversion, Microversion)> {
        match self {
            Self::Compute => Some((Microversion::new(2, 1), Microversion::new(2, 96))),
            _ => None,
        }
    }

    /// Whether a token is asked for before anything else, a wrong path included (keystone's own
    /// requests are authenticated by each route).
    pub(super) fn authenticates_first(self) -> bool {
        self != Self::Identity
    }
}

/// Where clients reach this cloud, such as `https://cloud.example:8443`; every link, `Location`
/// and catalogue entry is built from it, whatever a proxy in front does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicUrl(String);

impl PublicUrl {
    /// Takes an absolute http or https URL; a path in it is kept, a slash at its end is not.
    pub fn parse(text: &str) -> Result<Self, String> {
        let uri: http::Uri = text.parse().map_err(|error| format!("{text}: {error}"))?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.authority().is_none() {
            return Err(format!("{text}: give it as https://HOST[:PORT][/PATH]"));
        }
        if uri.query().is_some() {
            return Err(format!("{text}: a public URL has no query"));
        }
        Ok(Self(text.trim_end_matches('/').to_owned()))
    }

    /// Base of a service's links, without a slash at its end.
    pub fn service(&self, service: Service) -> String {
        format!("{}/{}", self.0, service.prefix())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_keep_the_path_of_a_proxy() {
        let url = PublicUrl::parse("https://cloud.example/api/").unwrap();
        assert_eq!(
            url.service(Service::Compute),
            "https://cloud.example/api/compute"
        );
    }

    #[test]
    fn what_is_no_absolute_url_is_refused() {
        for text in ["cloud.example", "/x", "ftp://x", "https://x/?a=b"] {
            assert!(PublicUrl::parse(text).is_err(), "{text}");
        }
    }
}
