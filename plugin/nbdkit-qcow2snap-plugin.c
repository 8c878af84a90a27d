/* What `nbdkit qcow2snap` loads: nbdkit's Python plugin, already told which script to run.
 *
 * The script could lie here itself, as a program without ".so".  nbdkit then runs that instead, and
 * the script's first line runs nbdkit again with its Python plugin; but by then the first nbdkit
 * has made the folder of the socket of "-U -", which nobody removes, and a socket that systemd or
 * nbdfuse handed over is forgotten.  That is what is installed where there is no compiler.
 *
 * The structure is that of nbdkit-plugin.h, whose layout nbdkit keeps for ever. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PYTHON PLUGINDIR "/nbdkit-python-plugin.so"

struct start { /* of struct nbdkit_plugin */
    uint64_t size;
    int api_version, thread_model;
    const char *name, *longname, *version, *description;
    void (*load)(void);
    void (*unload)(void);
    int (*config)(const char *key, const char *value);
    int (*config_complete)(void);
    const char *config_help;
};

static struct start *python; /* as it was before the name and load were exchanged */
static char script[4096];

static void load(void) {
    python->load();
    if (python->config("script", script) == -1)
        exit(EXIT_FAILURE); /* it has said why */
}

__attribute__((visibility("default"))) void *plugin_init(void) {
    Dl_info here;
    void *library = dlopen(PYTHON, RTLD_NOW | RTLD_GLOBAL), *(*init)(void);
    if (!library || !(*(void **)&init = dlsym(library, "plugin_init")) || !(python = init())) {
        fprintf(stderr, "nbdkit: error: nbdkit's Python plugin is missing: %s\n", dlerror());
        return NULL;
    }
    /* The script has our own name, with .py for .so. */
    if (!dladdr(script, &here) || strlen(here.dli_fname) >= sizeof script)
        return NULL;
    strcpy(script, here.dli_fname);
    strcpy(script + strlen(script) - 2, "py");

    struct start *ours = malloc(python->size);
    if (ours) {
        memcpy(ours, python, python->size);
        ours->name = "qcow2snap";
        ours->version = VERSION;
        ours->config_help = "file=<FILENAME>   (required) The qcow2 image.\n"
                            "snapshot=<NAME>   Serve this one alone.\n"
                            "All parameters are in nbdkit-qcow2snap-plugin(1).";
        ours->load = load;
    }
    return ours;
}
