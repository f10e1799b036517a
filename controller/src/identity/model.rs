//! Rows of identity.
//!
//! A domain is a project with `is_domain`, as in keystone. Members of a resource that have no
//! column (`email`, whatever a client adds) are JSON in `extra`.

/// One entity a module: `row!(module, table, { columns })`.
macro_rules! row {
    ($module:ident, $table:literal, { $($(#[$attribute:meta])* $column:ident : $kind:ty),+ $(,)? }) => {
        pub mod $module {
            use sea_orm::entity::prelude::*;

            #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
            #[sea_orm(table_name = $table)]
            pub struct Model {
                $($(#[$attribute])* pub $column: $kind,)+
            }

            #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
            pub enum Relation {}

            impl ActiveModelBehavior for ActiveModel {}
        }
    };
}

row!(revision, "identity_revision", {
    #[sea_orm(primary_key, auto_increment = false)]
    id: i32,
    revision: i64,
});

row!(project, "identity_project", {
    #[sea_orm(primary_key, auto_increment = false)]
    id: String,
    name: String,
    domain_id: String,
    parent_id: Option<String>,
    is_domain: bool,
    description: Option<String>,
    enabled: bool,
    tags: String,
    options: String,
    extra: String,
});

row!(user, "identity_user", {
    #[sea_orm(primary_key, auto_increment = false)]
    id: String,
    name: String,
    domain_id: String,
    enabled: bool,
    default_project_id: Option<String>,
    password_hash: Option<String>,
    valid_from_us: i64,
    created_at_us: i64,
    options: String,
    extra: String,
});

row!(role, "identity_role", {
    #[sea_orm(primary_key, auto_increment = false)]
    id: String,
    name: String,
    domain_id: String,
    description: Option<String>,
    options: String,
    extra: String,
});

row!(implied_role, "identity_implied_role", {
    #[sea_orm(primary_key, auto_increment = false)]
    prior_role_id: String,
    #[sea_orm(primary_key, auto_increment = false)]
    implied_role_id: String,
});

row!(assignment, "identity_assignment", {
    #[sea_orm(primary_key, auto_increment = false)]
    actor_id: String,
    #[sea_orm(primary_key, auto_increment = false)]
    target_kind: String,
    #[sea_orm(primary_key, auto_increment = false)]
    target_id: String,
    #[sea_orm(primary_key, auto_increment = false)]
    role_id: String,
});

row!(service, "identity_service", {
    #[sea_orm(primary_key, auto_increment = false)]
    id: String,
    kind: String,
    name: Option<String>,
    enabled: bool,
    extra: String,
});

row!(endpoint, "identity_endpoint", {
    #[sea_orm(primary_key, auto_increment = false)]
    id: String,
    service_id: String,
    region_id: Option<String>,
    interface: String,
    url: String,
    enabled: bool,
    extra: String,
});

row!(region, "identity_region", {
    #[sea_orm(primary_key, auto_increment = false)]
    id: String,
    description: String,
    parent_region_id: Option<String>,
    extra: String,
});

row!(revocation, "identity_revocation", {
    #[sea_orm(primary_key, auto_increment = false)]
    audit_id: String,
    expires_at_us: i64,
});

row!(token_key, "identity_token_key", {
    #[sea_orm(primary_key, auto_increment = false)]
    id: i64,
    wrapped: String,
    created_at_us: i64,
});

/// What a role is assigned on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    Project(String),
    Domain(String),
    System,
}

impl Target {
    /// The two columns of an assignment.
    pub fn columns(&self) -> (&'static str, &str) {
        match self {
            Self::Project(id) => ("project", id),
            Self::Domain(id) => ("domain", id),
            Self::System => ("system", "system"),
        }
    }
}
