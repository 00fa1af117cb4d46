"use strict";
(async () => {
  const byId = (id) => document.getElementById(id);
  const settings = JSON.parse(byId("settings").textContent);
  const [share, black, white, preset, overlay, opacity] =
    ["share", "black", "white", "preset", "overlay", "opacity"].map(byId);
  const [RESULT, INPUT, MAPS] = [0, 1, 2]; // indices, of the maps the lowest; the result comes first: the first volume is the grid of the display
  const CROSSHAIR = 0.4; // percent of the field of view

  const viewer = new niivue.Niivue({
    isRadiologicalConvention: true,
    sagittalNoseLeft: true,
    isOrientationTextVisible: settings.oriented,
    multiplanarShowRender: 0,
    isNearestInterpolation: true, // as the input, whose voxels NiiVue shows as they are
    dragMode: 0, // 3, which moves the image, would have the wheel zoom
    mouseEventConfig: { leftButton: { primary: 8 }, rightButton: 3, centerButton: 3 }, // crosshair; move
    dragAndDropEnabled: false,
    crosshairColor: [1, 0.6, 0, 0.7],
    crosshairWidth: CROSSHAIR,
    crosshairWidthUnit: "percent",
    logLevel: "error",
  });
  // a double click would change the window of the result alone, and keys would do what the page does not say
  for (const own of ["resetBriCon", "keyDownListener", "keyUpListener"]) viewer[own] = () => {};
  // NiiVue's own gray makes black voxels of overlays transparent
  viewer.addColormap("opaque gray", { R: [0, 255], G: [0, 255], B: [0, 255], A: [255, 255], I: [0, 255] });
  let crosshair = true;
  const rounded = (value) => Number(value.toPrecision(5));
  const maps = () => viewer.volumes.slice(MAPS);

  function draw() {
    const [low, high] = [black.valueAsNumber, white.valueAsNumber];
    for (const index of [RESULT, INPUT]) {
      if (low < high) Object.assign(viewer.volumes[index], { cal_min: low, cal_max: high });
    }
    viewer.volumes[INPUT].opacity = 1 - share.valueAsNumber / 100;
    const shown = overlay.selectedIndex - 1;
    maps().forEach((map, index) => { map.opacity = index === shown ? opacity.valueAsNumber / 100 : 0; });
    byId("bar").hidden = shown < 0;
    if (shown >= 0) [byId("low").value, byId("high").value] = settings.volumes[shown + MAPS].window.map(rounded);
    viewer.updateGLVolume();
  }

  function drawWindow(event) {
    if (event.target === preset) [black.value, white.value] = preset.value.split(" ");
    else preset.selectedIndex = -1; // that of the fields has no name
    draw();
  }

  function blend(percent) {
    share.value = percent;
    draw();
  }

  const flicker = () => blend(share.valueAsNumber >= 50 ? 0 : 100);

  function drawColors() {
    const colors = viewer.colormap("inferno"); // red, green, blue and opacity of 256 levels
    const stops = Array.from({ length: 16 }, (_, i) => `rgb(${colors.slice(68 * i, 68 * i + 3).join()})`);
    byId("colors").style.background = `linear-gradient(to right, ${stops})`;
  }

  function look(x, y, z, scale) {
    viewer.setPan2Dxyzmm([x, y, z, scale]);
    viewer.setCrosshairWidth(crosshair ? CROSSHAIR / scale : 0); // as wide on the screen as before
  }

  function zoom(factor) {
    const [x, y, z, before] = viewer.scene.pan2Dxyzmm;
    const scale = Math.min(Math.max(before * factor, 1), 16);
    const mm = viewer.frac2mm(viewer.scene.crosshairPos); // stays where it is
    look(...[x, y, z].map((pan, axis) => pan + (before - scale) * mm[axis]), scale);
  }

  function toggleCrosshair() {
    crosshair = !crosshair;
    look(...viewer.scene.pan2Dxyzmm);
  }

  function onWheel(event) {
    if (!event.ctrlKey) return; // other slices, by NiiVue
    event.preventDefault();
    event.stopPropagation();
    zoom(event.deltaY < 0 ? 1.25 : 0.8);
  }

  function nextMap() {
    overlay.selectedIndex = (overlay.selectedIndex + 1) % (maps().length + 1);
    draw();
  }

  function showPosition(location) {
    const [x, y, z] = Array.from(location.mm);
    const place = settings.oriented
      ? [[x, "right", "left"], [y, "anterior", "posterior"], [z, "superior", "inferior"]]
          .map(([mm, positive, negative]) => `${Math.abs(mm).toFixed(1)} mm ${mm < 0 ? negative : positive}`)
      : [x, y, z].map((mm) => `${mm.toFixed(1)} mm`);
    const values = [INPUT, RESULT, ...maps().map((_, index) => index + MAPS)].filter((index) => location.values[index])
      .map((index) => `${location.values[index].name} ${rounded(location.values[index].value)}`);
    byId("position").textContent = `${place.join(", ")}: ${values.join(", ")}`;
  }

  // the patient's right and anterior are on the left of the pictures
  const steps = {
    ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0],
    PageUp: [0, 0, 1], PageDown: [0, 0, -1],
  };
  const commands = {
    f: flicker,
    e: nextMap,
    c: toggleCrosshair,
    r: () => look(0, 0, 0, 1),
    "+": () => zoom(1.25),
    "=": () => zoom(1.25), // the same key without Shift
    "-": () => zoom(0.8),
    "[": () => blend(share.valueAsNumber - 10),
    "]": () => blend(share.valueAsNumber + 10),
  };

  function onKey(event) {
    const typing = event.target.matches("select, input:not([type=checkbox])");
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = typing ? undefined : steps[event.key];
    const command = event.target.type === "number" ? undefined : commands[event.key.toLowerCase()];
    if (!step && !command) return;
    event.preventDefault();
    if (step) viewer.moveCrosshairInVox(...step);
    else command();
  }

  try {
    await viewer.attachToCanvas(byId("canvas"));
    for (const { id, name, colormap, window } of settings.volumes) {
      const element = byId(id);
      const options = { name: `${id}.nii.gz`, base64: element.textContent, colormap };
      const volume = await niivue.NVImage.loadFromBase64({ ...options, cal_min: window[0], cal_max: window[1] });
      element.remove(); // its text would stay in memory
      volume.name = name;
      viewer.addVolume(volume);
    }
  } catch (error) {
    document.body.dataset.state = "failed";
    byId("message").textContent =
      `The pictures cannot be drawn (${error.message}): a browser with WebGL 2 is needed. The table describes the volumes.`;
    return;
  }

  [black.value, white.value] = preset.value.split(" ");
  byId("maps").hidden = maps().length === 0;
  drawColors();
  viewer.onLocationChange = showPosition;
  for (const control of [share, overlay, opacity]) control.addEventListener("input", draw);
  for (const control of [black, white, preset]) control.addEventListener("input", drawWindow);
  byId("view").addEventListener("wheel", onWheel, { capture: true, passive: false });
  byId("planes").addEventListener("change", (event) => viewer.setSliceType(Number(event.target.value)));
  byId("flicker").addEventListener("click", flicker);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", onKey);
  draw();
  viewer.createOnLocationChange();
  document.body.dataset.state = "ready";
})();
