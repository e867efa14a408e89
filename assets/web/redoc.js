"use strict";

Redoc.init(
  // From this file's own address, because the page's may end in a slash and may have a prefix
  // before it.
  new URL("../schema", document.currentScript.src).href,
  // Native scrollbars, because ReDoc's own ones are a script that restyles the page while it
  // scrolls.
  { nativeScrollbars: true },
  document.getElementById("redoc"),
);
