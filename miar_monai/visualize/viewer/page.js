"use strict";
(async () => {
  const byId = (id) => document.getElementById(id);
  const settings = JSON.parse(byId("settings").textContent);
  const [share, black, white, overlay, opacity] = ["share", "black", "white", "overlay", "opacity"].map(byId);
  const [RESULT, INPUT, MAPS] = [0, 1, 2]; // indices, of the maps the lowest; the result comes first: the first volume is the grid of the display

  const viewer = new niivue.Niivue({
    isRadiologicalConvention: true,
    sagittalNoseLeft: true,
    isOrientationTextVisible: settings.oriented,
    multiplanarShowRender: 0,
    dragMode: 3, // the right button moves the image; the window is that of both volumes and has fields of its own
    viewModeHotKey: "",
    clipPlaneHotKey: "",
    cycleClipPlaneHotKey: "",
    dragAndDropEnabled: false,
    crosshairColor: [1, 0.6, 0, 0.7],
    logLevel: "error",
  });
  // NiiVue's own gray makes black voxels of overlays transparent
  viewer.addColormap("opaque gray", { R: [0, 255], G: [0, 255], B: [0, 255], A: [255, 255], I: [0, 255] });
  const rounded = (value) => Number(value.toPrecision(5));
  const maps = () => viewer.volumes.slice(MAPS);

  function draw() {
    const [low, high] = [black.valueAsNumber, white.valueAsNumber];
    for (const index of [RESULT, INPUT]) {
      if (low < high) Object.assign(viewer.volumes[index], { cal_min: low, cal_max: high });
    }
    viewer.volumes[INPUT].opacity = 1 - share.valueAsNumber / 100;
    maps().forEach((map, index) => {
      const chosen = index === overlay.selectedIndex - 1;
      map.opacity = chosen ? opacity.valueAsNumber / 100 : 0;
      // without a choice the first one: the pictures would move when the bar comes and goes
      map.colorbarVisible = chosen || (overlay.selectedIndex === 0 && index === 0);
    });
    viewer.updateGLVolume();
  }

  function blend(percent) {
    share.value = percent;
    draw();
  }

  const flicker = () => blend(share.valueAsNumber >= 50 ? 0 : 100);

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
    r: () => viewer.setPan2Dxyzmm([0, 0, 0, 1]),
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
      volume.colorbarVisible = false;
      viewer.addVolume(volume);
    }
  } catch (error) {
    document.body.dataset.state = "failed";
    byId("message").textContent =
      `The pictures cannot be drawn (${error.message}): a browser with WebGL 2 is needed. The table describes the volumes.`;
    return;
  }

  [black.value, white.value] = settings.volumes[RESULT].window.map(rounded);
  byId("maps").hidden = maps().length === 0;
  viewer.opts.isColorbar = maps().length > 0;
  viewer.onLocationChange = showPosition;
  for (const control of [share, black, white, overlay, opacity]) control.addEventListener("input", draw);
  byId("planes").addEventListener("change", (event) => viewer.setSliceType(Number(event.target.value)));
  byId("flicker").addEventListener("click", flicker);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  document.addEventListener("keydown", onKey);
  draw();
  viewer.createOnLocationChange();
  document.body.dataset.state = "ready";
})();
