//! Roles: what a caller must be for an endpoint.
//!
//! Owns the meaning of the roles admin, manager, member, reader and service. Which project a
//! resource belongs to is its service's business, not this module's.

use crate::http::{ApiError, Caller, Identity, Service};

/// What an endpoint asks of its caller, by the name that OpenStack's policy has for it (users see
/// the name in the 403).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    pub name: &'static str,
    pub needs: Needs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// No token.
    Nothing,
    /// Any valid token; the handler decides what it gives to whom.
    Token,
    /// One of the roles reader, member, manager, admin in the token's scope.
    Reader,
    /// member, manager or admin.
    Member,
    /// manager or admin.
    Manager,
    Admin,
    /// A service of the cloud, or admin.
    Service,
}

impl Rule {
    pub const fn open() -> Self {
        Self {
            name: "",
            needs: Needs::Nothing,
        }
    }

    pub const fn token(name: &'static str) -> Self {
        Self {
            name,
            needs: Needs::Token,
        }
    }

    pub const fn reader(name: &'static str) -> Self {
        Self {
            name,
            needs: Needs::Reader,
        }
    }

    pub const fn member(name: &'static str) -> Self {
        Self {
            name,
            needs: Needs::Member,
        }
    }

    pub const fn manager(name: &'static str) -> Self {
        Self {
            name,
            needs: Needs::Manager,
        }
    }

    pub const fn admin(name: &'static str) -> Self {
        Self {
            name,
            needs: Needs::Admin,
        }
    }

    pub const fn service(name: &'static str) -> Self {
        Self {
            name,
            needs: Needs::Service,
        }
    }

    /// Whether the rule lets `caller` through.
    pub fn allows(&self, caller: &Identity) -> bool {
        let one_of = |names: &[&str]| names.iter().any(|name| caller.has_role(name));
        match self.needs {
            Needs::Nothing | Needs::Token => true,
            Needs::Reader => one_of(&["reader", "member", "manager", "admin"]),
            Needs::Member => one_of(&["member", "manager", "admin"]),
            Needs::Manager => one_of(&["manager", "admin"]),
            Needs::Admin => caller.is_admin(),
            Needs::Service => one_of(&["service", "admin"]),
        }
    }
}

/// Lets the caller through or answers 403, in the words of the service.
pub fn require(caller: &Caller, rule: Rule, service: Service) -> Result<(), ApiError> {
    if rule.allows(caller.identity()) {
        return Ok(());
    }
    let name = rule.name;
    Err(ApiError::forbidden(match service {
        Service::Identity => {
            format!("You are not authorized to perform the requested action: {name}.")
        }
        Service::Image => "You are not authorized to complete this action.".to_owned(),
        _ => format!("Policy doesn't allow {name} to be performed."),
    }))
}
