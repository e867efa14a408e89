"use strict";

// A file of its own, not an inline script, so that the page's Content-Security-Policy can refuse
// every inline script.
window.ui = SwaggerUIBundle({
  // From this file's own address, because the page's may end in a slash and may have a prefix
  // before it.
  url: new URL("../schema", document.currentScript.src).href,
  dom_id: "#swagger-ui",
  deepLinking: true,
  displayRequestDuration: true,
  // The default sends the schema's address to a public validator: nothing leaves this server.
  validatorUrl: null,
  // A token typed into "Authorize" lives as long as the page and is never written to the browser's
  // storage.
  persistAuthorization: false,
  presets: [SwaggerUIBundle.presets.apis],
  plugins: [
    // "Try it out" sends a plain request, which no WebSocket route answers.
    () => ({
      statePlugins: {
        spec: { wrapSelectors: { allowTryItOutFor: () => (state, path) => !path.startsWith("/ws/") } },
      },
    }),
  ],
  layout: "BaseLayout",
});
