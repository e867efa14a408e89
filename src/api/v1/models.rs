//! `GET /v1/models`: the models that a caller may use.

use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use utoipa::ToSchema;

use super::errors::OpenAiErrorResponse;
use super::seconds;
use crate::api::authenticate::AnyCaller;
use crate::api::error::ApiError;
use crate::api::state::AppState;
use crate::error::Error;
use crate::services::models::ServedModel;

/// A model.
#[derive(Serialize, ToSchema)]
pub struct ModelResponse {
    /// Its name, as requests name it.
    #[schema(example = "gpt-6-luna")]
    id: String,
    /// Always `model`.
    #[schema(example = "model")]
    object: &'static str,
    /// When it was made, in seconds since 1970; 0 if the upstream does not say so.
    created: u64,
    /// Who has made it, or the upstream's name.
    #[schema(example = "openai")]
    owned_by: String,
    /// The day from which its upstream does not serve it any more, if that is known.
    #[schema(required = true, format = "date", example = "2027-01-14")]
    shutdown_date: Option<String>,
}

/// Models, in the order of the upstreams.
#[derive(Serialize, ToSchema)]
pub struct ModelListResponse {
    /// Always `list`.
    #[schema(example = "list")]
    object: &'static str,
    data: Vec<ModelResponse>,
}

impl From<ServedModel> for ModelResponse {
    fn from(model: ServedModel) -> Self {
        let day = |time| {
            let text = humantime::format_rfc3339_seconds(time).to_string();
            text.split('T').next().unwrap_or_default().to_owned()
        };
        Self {
            id: model.id,
            object: "model",
            created: model.created.unwrap_or(0),
            owned_by: model.owned_by,
            shutdown_date: model.shutdown.filter(|time| seconds(*time) > 0).map(day),
        }
    }
}

/// List models
///
/// The models of all upstreams that the caller may use, and the model of the embeddings. The lists
/// of the upstreams are at most some minutes old; an upstream that is unavailable hides only its
/// own models.
#[utoipa::path(
    get, path = "/v1/models", tag = "v1", operation_id = "list_models", security(("bearer" = []), ("api_key" = [])),
    responses((status = 200, description = "The models.", body = ModelListResponse)),
)]
pub async fn list_models(
    State(state): State<AppState>,
    AnyCaller(caller): AnyCaller,
) -> Json<ModelListResponse> {
    let models = state.models.list().await.into_iter();
    let data = models
        .filter(|model| caller.may_use_model(&model.id))
        .map(ModelResponse::from)
        .collect();
    Json(ModelListResponse {
        object: "list",
        data,
    })
}

/// Show a model
///
/// One of the models that the caller may use.
#[utoipa::path(
    get, path = "/v1/models/{model}", tag = "v1", operation_id = "show_model", security(("bearer" = []), ("api_key" = [])),
    params(("model" = String, Path, description = "The model's name. One with a slash is written with `%2F`.")),
    responses(
        (status = 200, description = "The model.", body = ModelResponse),
        (status = 404, description = "There is no such model, or the key may not use it.", body = OpenAiErrorResponse),
    ),
)]
pub async fn show_model(
    State(state): State<AppState>,
    AnyCaller(caller): AnyCaller,
    Path(id): Path<String>,
) -> Result<Json<ModelResponse>, ApiError> {
    if !caller.may_use_model(&id) {
        return Err(Error::ModelNotFound.into());
    }
    let models = state.models.list().await;
    let model = models.into_iter().find(|model| model.id == id);
    Ok(Json(model.ok_or(Error::ModelNotFound)?.into()))
}
