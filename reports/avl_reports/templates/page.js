// Draws the plots in the page's theme. Plots come in light colours; dark ones are exchanged in the text of a plot.
// The plotting library lies in the page as base64 of gzip, a third of its size.
"use strict";
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const dark = new Map(JSON.parse(document.getElementById("colours").textContent));
  const literal = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const light = new RegExp([...dark.keys()].map(literal).join("|"), "g");
  const settings = { responsive: true, typesetMath: false, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
  const wide = window.matchMedia("(min-width: 561px)");
  const preferred = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  let run = 0;

  async function loadPlotly() {
    const bytes = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.appendChild(script);
  }

  function isDark() { return chosen === null ? preferred.matches : chosen === "dark"; }

  function plotOf(element) {
    const text = document.getElementById(element.dataset.plot).textContent;
    const plot = JSON.parse(isDark() ? text.replace(light, (colour) => dark.get(colour)) : text);
    plot.layout.height = element.clientHeight;
    return plot;
  }

  async function drawAll() {
    const mine = ++run;
    root.dataset.theme = isDark() ? "dark" : "light";
    button.textContent = isDark() ? "light" : "dark";
    button.setAttribute("aria-pressed", String(isDark()));
    for (const element of document.querySelectorAll(".plot")) {
      if (mine !== run) return;
      const plot = plotOf(element);
      const bar = { displayModeBar: wide.matches ? "hover" : false };
      await Plotly.react(element, plot.data, plot.layout, { ...settings, ...bar });
      if (plot.frames && plot.frames.length) {
        await Plotly.addFrames(element, plot.frames, plot.frames.map((_, index) => index));
      }
    }
    root.dataset.ready = "yes";
  }

  button.addEventListener("click", () => { chosen = isDark() ? "light" : "dark"; drawAll(); });
  preferred.addEventListener("change", () => { if (chosen === null) drawAll(); });
  root.dataset.theme = isDark() ? "dark" : "light";
  if (typeof DecompressionStream === "undefined") {
    document.getElementById("outdated").hidden = false;
  } else {
    loadPlotly().then(drawAll);
  }
})();
