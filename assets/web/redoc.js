"use strict";

// Native scrollbars, because ReDoc's own ones are a script that restyles the page while it scrolls.
Redoc.init("/schema", { nativeScrollbars: true }, document.getElementById("redoc"));
