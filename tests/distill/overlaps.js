// What lies over something else, spills out of its box, or is wider than its window, as a list of lines.
// Called by test_report_in_chromium.py with the window of each frame that holds the page.
function findings(view) {
  const page = view.document, width = view.innerWidth, found = [];
  for (const part of page.querySelectorAll("details")) part.open = true;

  // What a box that scrolls sideways does not show lies over nothing.
  function shown(rect, element) {
    const scroll = element.closest(".scroll");
    const edge = scroll ? scroll.getBoundingClientRect() : { left: -Infinity, right: Infinity };
    return {
      left: Math.max(rect.left, edge.left), right: Math.min(rect.right, edge.right), top: rect.top, bottom: rect.bottom,
    };
  }

  const boxes = [];
  const texts = page.createTreeWalker(page.body, view.NodeFilter.SHOW_TEXT);
  for (let node = texts.nextNode(); node; node = texts.nextNode()) {
    if (!node.data.trim() || node.parentElement.closest("style, script, svg")) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    for (const rect of range.getClientRects())
      boxes.push({ owner: node, name: node.data.trim().slice(0, 40), ...shown(rect, node.parentElement) });
  }
  // matplotlib draws text as outlines in groups that are named text_1, text_2, …
  for (const group of page.querySelectorAll("svg g[id*='text_']")) {
    const rect = group.getBoundingClientRect(), frame = group.closest("svg").getBoundingClientRect();
    boxes.push({ owner: group, name: group.id, ...shown(rect, group) });
    if (rect.left < frame.left - 1 || rect.right > frame.right + 1 || rect.top < frame.top - 1 || rect.bottom > frame.bottom + 1)
      found.push(`outside its plot: ${group.id}`);
  }
  boxes.forEach((a, i) => {
    for (const b of boxes.slice(i + 1)) {
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      // Boxes of text reach over the letters; a touch of two pixels is none.
      if (a.owner !== b.owner && across > 1 && down > 2) found.push(`overlap: "${a.name}" and "${b.name}"`);
    }
  });

  if (page.documentElement.scrollWidth > width) found.push(`the page is ${page.documentElement.scrollWidth} wide`);
  for (const element of page.body.querySelectorAll("*")) {
    if (element.closest("svg") && element.tagName !== "svg") continue;
    const rect = element.getBoundingClientRect(), name = `${element.tagName} "${element.textContent.trim().slice(0, 40)}"`;
    if (!element.closest(".scroll") && (rect.left < -0.5 || rect.right > width + 0.5)) found.push(`too wide: ${name}`);
    const isScroll = element.classList.contains("scroll");
    if (!isScroll && element.clientWidth > 0 && element.scrollWidth > element.clientWidth + 1) found.push(`spills: ${name}`);
  }
  return { width: width, boxes: boxes.length, found: found };
}
