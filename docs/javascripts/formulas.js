// Draws the formulas of a page, each time that the theme puts one on the screen.
document$.subscribe(function () {
  document.querySelectorAll(".arithmatex:not([data-drawn])").forEach(function (place) {
    // pymdownx.arithmatex writes \(...\) and \[...\].
    var source = place.textContent.trim();
    katex.render(source.slice(2, -2), place, {
      displayMode: source.startsWith("\\["),
      throwOnError: false,
      output: "htmlAndMathml",
    });
    place.setAttribute("data-drawn", "");
  });
});
