"use strict";

// A file of its own, not an inline script, so that the page's Content-Security-Policy can refuse every inline script.
window.ui = SwaggerUIBundle({
  url: "/schema",
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  // The default sends the schema's address to a public validator: nothing leaves this server.
  validatorUrl: null,
  // A token typed into "Authorize" lives as long as the page and is never written to the browser's storage.
  persistAuthorization: false,
  presets: [SwaggerUIBundle.presets.apis],
  layout: "BaseLayout",
});
